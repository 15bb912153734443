"""Worker processes on this machine, reached over pipes: a fleet without Ray, for tests and bare GPU machines."""

import multiprocessing
import os
import queue
import signal
import threading
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import Any

import torch

from evenkeel.control import messages as m
from evenkeel.core.ids import NodeId, WorkerId
from evenkeel.engine.job import Job
from evenkeel.engine.worker import ToWorker, Worker

_PRELOAD = ("torch", "torch.distributed", "evenkeel.engine.worker")


class Fleet:
    """Starts, reaches and ends worker processes. What they say, and their deaths, arrive in `events`.

    Processes fork from a server that has imported torch and run nothing, so one is ready in a fraction of a second.

    Args:
        make_job: called in each new process with the worker's id; picklable.
        prefix: of the workers' ids, which are numbered from 0 and never used again.
        static: nobody will acknowledge reports; each counts as acknowledged when sent.
    """

    def __init__(
        self,
        make_job: Callable[[WorkerId], Job],
        *,
        threads: int = 1,
        device: str = "cpu",
        prefix: str = "w",
        static: bool = False,
    ) -> None:
        self.events: queue.SimpleQueue[m.Event] = queue.SimpleQueue()
        self._make_job = make_job
        self._options = (device, threads, static)
        self._prefix = prefix
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(list(_PRELOAD))
        self._processes: dict[WorkerId, _Process] = {}

    def start(self) -> WorkerId:
        """Starts a worker in the background; WorkerReady comes when it is."""
        worker_id = WorkerId(f"{self._prefix}{len(self._processes):04d}")
        ours, theirs = self._context.Pipe()
        arguments = (theirs, worker_id, self._make_job, *self._options)
        process = self._context.Process(target=_serve, args=arguments, name=worker_id, daemon=True)
        process.start()
        theirs.close()
        self._processes[worker_id] = _Process(worker_id, process, ours, self.events)
        return worker_id

    def send(self, command: ToWorker) -> None:
        """Delivers a command; to a dead worker it is dropped, as WorkerLost comes or has come."""
        self._processes[command.worker_id].send(command)

    def acknowledge(self, worker_id: WorkerId, step: int) -> None:
        self._processes[worker_id].send(step)

    def signal(self, worker_id: WorkerId, number: int = signal.SIGKILL) -> None:
        """Sends a signal to a worker's process, if it lives."""
        self._processes[worker_id].signal(number)

    def pid(self, worker_id: WorkerId) -> int:
        return self._processes[worker_id].pid

    def close(self) -> None:
        """Ends every process and waits for it."""
        for process in self._processes.values():
            process.signal(signal.SIGKILL)
        for process in self._processes.values():
            process.join()


class _Process:
    """One worker process, seen from the parent, with the thread that reads what it says."""

    def __init__(
        self,
        worker_id: WorkerId,
        process: multiprocessing.process.BaseProcess,
        pipe: "Connection[Any, Any]",
        events: queue.SimpleQueue[m.Event],
    ) -> None:
        assert process.pid is not None
        self.pid = process.pid
        self._worker_id = worker_id
        self._process = process
        self._pipe = pipe
        self._events = events
        self._gone = False
        self._reader = threading.Thread(target=self._read, name=f"read-{worker_id}", daemon=True)
        self._reader.start()

    def send(self, message: object) -> None:
        with suppress(OSError):
            self._pipe.send(message)

    def signal(self, number: int) -> None:
        if not self._gone:
            with suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def join(self) -> None:
        self._reader.join()

    def _read(self) -> None:
        try:
            while True:
                self._events.put(self._pipe.recv())
        except (EOFError, OSError):
            self._process.join()
        self._gone = True
        cause = _cause(self._process.exitcode)
        self._pipe.close()
        self._process.close()  # or its descriptor would stay as long as the fleet
        self._events.put(m.WorkerLost(self._worker_id, cause))


def _cause(exitcode: int | None) -> str:
    if exitcode is not None and exitcode < 0:
        return f"killed by {signal.Signals(-exitcode).name}"
    return f"exit status {exitcode}"


def _serve(
    pipe: "Connection[Any, Any]",
    worker_id: WorkerId,
    make_job: Callable[[WorkerId], Job],
    device: str,
    threads: int,
    static: bool,
) -> None:
    """The main thread of a worker process: reads commands, answers from threads of their own what may block."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole process group; the parent decides
    torch.set_num_threads(threads)
    sending = threading.Lock()

    def send(event: m.Event | None) -> None:
        if static and isinstance(event, m.Reported):
            worker.acknowledge(event.reports[-1].vote.step)
        if event is not None:
            with sending:
                pipe.send(event)

    worker = Worker(worker_id, NodeId("local"), make_job(worker_id), send, device=device)
    send(m.WorkerReady(worker.info()))
    while True:
        try:
            command = pipe.recv()
        except (EOFError, OSError):
            os._exit(0)  # the parent is gone
        match command:
            case int():
                worker.acknowledge(command)
            case m.Abort() | m.Settle():
                threading.Thread(target=lambda c=command: send(worker.deliver(c)), daemon=True).start()
            case _:
                send(worker.deliver(command))
