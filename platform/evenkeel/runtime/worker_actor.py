"""One Ray actor per device: the engine's Worker, reached over control threads of its own.

Imports torch only once a worker is being made: the controller's process knows this class too and has no use for it.
"""

from __future__ import annotations

import logging
import os
import queue
import threading
import traceback
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import ray
from ray import cloudpickle

from evenkeel.control import messages as m
from evenkeel.core.ids import NodeId, WorkerId
from evenkeel.core.layout import WorkerInfo
from evenkeel.runtime.calls import ActorDead, insist
from evenkeel.runtime.logs import ProcessLog

if TYPE_CHECKING:
    from evenkeel.engine.job import Job
    from evenkeel.engine.worker import Worker

CONCURRENCY = {"control": 8, "watch": 1}
"""Threads for deliver and info, so that a probe answers while an abort waits; and one for the call that never ends."""
OUTBOX_FAILED = 71
"""Exit status of a worker whose reports reach nobody."""
DRAIN_S = 1.0
"""Below the time that a worker has for its answer: a controller that is slow to hear is still answered."""

Make = Callable[[WorkerId], "Job"]
"""Builds a worker's job in the worker's own process."""


class WorkerActor:
    """See the module. An error while the job is built is not raised but told by `info`, so that it has one line."""

    def __init__(self, worker_id: WorkerId, folder: str, make: bytes, device: str, controller: Any) -> None:
        logging.getLogger("ray").setLevel(logging.ERROR)
        self._never = threading.Event()
        self._worker: Worker | None = None
        self._error = ""
        self._log = ProcessLog(folder, worker_id)
        self._outbox = Outbox(controller, self._log)
        try:
            from evenkeel.engine.worker import Worker

            build: Make = cloudpickle.loads(make)
            context = ray.get_runtime_context()
            self._worker = Worker(
                worker_id,
                NodeId(context.get_node_id()),
                build(worker_id),
                self._outbox.put,
                host=ray.util.get_node_ip_address(),  # type: ignore[no-untyped-call]
                device=device,
            )
        except Exception as error:  # the border of the process: what the user's code raises is told in one line
            traceback.print_exc()
            self._log.publish()
            self._error = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}".rstrip(": ")
        else:
            self._outbox.begin(self._worker)

    @ray.method(concurrency_group="control")
    def info(self) -> WorkerInfo | str:
        """Who it is, or in one line why it could not be built."""
        return self._error if self._worker is None else self._worker.info()

    @ray.method(concurrency_group="control")
    def deliver(self, command: m.Abort | m.Settle | m.Form | m.Request | m.Probe) -> m.Event | None:
        assert self._worker is not None
        event = self._worker.deliver(command)
        if isinstance(event, m.Answered):
            self._outbox.drain()  # why it failed is heard before what it answers, which may settle everything
        return event

    @ray.method(concurrency_group="control")
    def acknowledge(self, step: int) -> None:
        """For a spare: this step is visible."""
        assert self._worker is not None
        self._worker.acknowledge(step)

    @ray.method(concurrency_group="watch")
    def watch(self) -> None:
        """Never returns: the caller hears of this process's death by the failure of the call."""
        self._never.wait()


class Outbox:
    """Sends the training thread's events to the controller in order, one at a time, from a thread of its own.

    An event counts as heard when the call has returned: then all that follows from it is durable, and the worker may
    forget the reports up to the step that the controller answers with.
    """

    def __init__(self, controller: Any, log: ProcessLog) -> None:
        self._controller = controller
        self._log = log
        self._events: queue.SimpleQueue[m.Event | threading.Event] = queue.SimpleQueue()
        self.put: Callable[[m.Event], None] = self._events.put

    def begin(self, worker: Worker) -> None:
        threading.Thread(target=self._run, args=(worker,), name="outbox", daemon=True).start()

    def drain(self) -> None:
        """Returns when all that was put in before has been heard, or after DRAIN_S."""
        done = threading.Event()
        self._events.put(done)
        done.wait(DRAIN_S)

    def _run(self, worker: Worker) -> None:
        try:
            while True:
                event = self._events.get()
                if isinstance(event, threading.Event):
                    event.set()
                    continue
                if isinstance(event, m.Failed):
                    self._log.publish()  # the traceback is there before anybody hears of the error
                worker.acknowledge(self._tell(event))
        except BaseException:  # the border of the thread: a worker that cannot tell any more is dead, which is heard
            traceback.print_exc()
            os._exit(OUTBOX_FAILED)

    def _tell(self, event: m.Event) -> int:
        try:
            return int(insist(lambda: self._controller.hear.remote(event)))
        except ActorDead:
            os._exit(0)  # nobody will restart it: the run is over
