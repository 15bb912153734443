"""The workers of a run, as the controller actor reaches them: started, spoken to, watched, ended.

Everything here runs on the controller's event loop and waits for nothing: what comes back is heard as an event.
"""

import asyncio
import logging
import os
import signal
from collections.abc import Callable, Collection
from contextlib import suppress
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError

from evenkeel.control import messages as m
from evenkeel.core.ids import NodeId, WorkerId
from evenkeel.core.layout import WorkerInfo
from evenkeel.runtime.calls import ActorAway, ActorDead, NodeDead, awaited, insist_awaited, last_line
from evenkeel.runtime.names import NAMESPACE, number_of, worker_id, worker_name, worker_of
from evenkeel.runtime.spec import WorkerSpec
from evenkeel.runtime.tasks import Spawn
from evenkeel.runtime.worker_actor import CONCURRENCY, WorkerActor

log = logging.getLogger(__name__)

REPLACE_AFTER_S = 2.0
"""Starting a process takes seconds of CPU time; where others train already, their repair goes first."""

FIND_S = 5.0
"""For a worker to say that it is there, to a controller that was restarted. Its training goes on meanwhile."""

ToWorker = m.Abort | m.Settle | m.Form | m.Request | m.Probe
Hear = Callable[[m.Event], None]


class Fleet:
    """See the module.

    Args:
        run: the run's name.
        controller: the actor that workers send their events to.
        hear: takes what the fleet has to tell.
        spawn: runs what waits for workers.
        used: the highest number of a worker that the run ever had; ids are never used again.
    """

    def __init__(
        self, run: str, spec: WorkerSpec, controller: Any, hear: Hear, spawn: Spawn, used: int = 0
    ) -> None:
        self._run = run
        self._spec = spec
        self._controller = controller
        self._hear = hear
        self._spawn = spawn
        self._used = used
        self._class = ray.remote(concurrency_groups=CONCURRENCY)(WorkerActor)  # type: ignore[call-overload]
        self._node = NodeId(ray.get_runtime_context().get_node_id())
        self._actors: dict[WorkerId, Any] = {}
        self._watches: set[asyncio.Task[None]] = set()
        self._infos: dict[WorkerId, WorkerInfo] = {}
        self._reasons: dict[WorkerId, str] = {}
        self._placed: set[WorkerId] = set()
        self._coming = 0
        """Workers that an earlier life has begun to start, and this one has not asked for yet."""
        self._closing = False

    def start(self, count: int) -> None:
        """Starts workers in the background; WorkerReady or WorkerLost tells how each of them went."""
        coming = min(count, self._coming)
        self._coming -= coming
        count -= coming
        if self._infos:
            self._spawn(self._start_later(count))
        else:
            self._start(count)

    async def _start_later(self, count: int) -> None:
        await asyncio.sleep(REPLACE_AFTER_S)
        self._start(count)

    def _start(self, count: int) -> None:
        for _ in range(0 if self._closing else count):
            self._used += 1
            worker = worker_id(self._used)
            try:
                self._begin(worker, self._create(worker))
            except (RayError, ValueError) as error:
                self._hear(m.StartFailed(1, last_line(error)))

    async def find(self, known: Collection[WorkerId]) -> tuple[WorkerInfo, ...]:
        """The workers that an earlier life of the controller has left, by the names of their actors.

        Of those that were not `known` to be ready nobody waits: they are being started, and tell when they are.
        """
        names = [e["name"] for e in ray.util.list_named_actors(all_namespaces=True) if e["namespace"] == NAMESPACE]
        workers = {worker: name for name in names if (worker := worker_of(self._run, name)) is not None}
        self._used = max([self._used, *(number_of(worker) or 0 for worker in workers)])
        for worker in sorted(workers.keys() - set(known)):
            with suppress(ValueError):  # it has just died
                self._begin(worker, ray.get_actor(workers[worker], NAMESPACE))
                self._coming += 1
        found = await asyncio.gather(*(self._find(w, name) for w, name in workers.items() if w in known))
        return tuple(sorted((info for info in found if info is not None), key=lambda info: info.worker_id))

    async def _find(self, worker: WorkerId, name: str) -> WorkerInfo | None:
        """A worker that answers is taken over; one that does not is ended, like one that has nothing to offer."""
        try:
            actor = ray.get_actor(name, NAMESPACE)
            info: WorkerInfo | str = await asyncio.wait_for(awaited(actor.info.remote()), FIND_S)
        except (ActorDead, ValueError):
            return None
        except (TimeoutError, ActorAway, RayTaskError):
            info = ""
        if not isinstance(info, WorkerInfo):
            ray.kill(actor)
            return None
        self._adopt(worker, actor)
        self._infos[worker] = info
        return info

    def send(self, command: ToWorker) -> None:
        """Delivers a command; the reply, if any, is heard. To a dead worker it is dropped: its loss is heard anyway."""
        actor = self._actors.get(command.worker_id)
        if isinstance(command, m.Form):
            self._placed.add(command.worker_id)
        if actor is not None:
            self._spawn(self._deliver(actor, command))

    def committed(self, step: int) -> None:
        """Tells the workers that never had a place of a visible step, if they are to know."""
        if self._spec.tell_spares:
            for worker in self._infos.keys() - self._placed:
                if worker in self._actors:
                    self._actors[worker].acknowledge.remote(step)

    def kill(self, worker: WorkerId, reason: str) -> None:
        """Ends a worker's process; WorkerLost confirms it."""
        self._reasons.setdefault(worker, reason)
        actor = self._actors.get(worker)
        if actor is None:
            return
        info = self._infos.get(worker)
        if info is not None and info.node_id == self._node:
            # Ray asks politely and waits 5 s before it kills a process that is stopped (SIGSTOP), yet calls it dead.
            with suppress(ProcessLookupError, PermissionError):
                os.kill(info.pid, signal.SIGKILL)
        ray.kill(actor)

    async def close(self) -> None:
        """Ends every worker and returns when all are confirmed dead."""
        self._closing = True
        for worker in list(self._actors):
            self.kill(worker, "the run is over")
        if self._watches:
            await asyncio.wait(self._watches)

    def _create(self, worker: WorkerId) -> Any:
        options = self._class.options(
            name=worker_name(self._run, worker),
            namespace=NAMESPACE,
            lifetime="detached",
            max_restarts=0,
            max_task_retries=0,
            **self._spec.options(),
        )
        return options.remote(worker, self._spec.folder, self._spec.make, self._spec.device, self._controller)

    def _begin(self, worker: WorkerId, actor: Any) -> None:
        self._adopt(worker, actor)
        self._spawn(self._bring_up(worker, actor))

    def _adopt(self, worker: WorkerId, actor: Any) -> None:
        self._actors[worker] = actor
        watch = self._spawn(self._watch(worker, actor))
        self._watches.add(watch)
        watch.add_done_callback(self._watches.discard)

    async def _bring_up(self, worker: WorkerId, actor: Any) -> None:
        try:
            info = await insist_awaited(actor.info.remote)
        except ActorDead:
            return  # the watch tells
        except RayTaskError as error:
            info = last_line(error)
        if isinstance(info, WorkerInfo):
            self._infos[worker] = info
            self._hear(m.WorkerReady(info))
        else:
            self.kill(worker, info)

    async def _watch(self, worker: WorkerId, actor: Any) -> None:
        try:
            await insist_awaited(actor.watch.remote)
        except ActorDead as dead:
            del self._actors[worker]
            self._hear(m.WorkerLost(worker, self._reasons.get(worker) or str(dead), isinstance(dead, NodeDead)))

    async def _deliver(self, actor: Any, command: ToWorker) -> None:
        try:
            event = await awaited(actor.deliver.remote(command))
        except (ActorDead, ActorAway):
            return  # of the one the watch tells; the other may not have heard it, and is missed like one that is slow
        except RayTaskError as error:
            log.exception("%s could not be carried out", command)
            self.kill(command.worker_id, f"{type(command).__name__.lower()} raised: {last_line(error)}")
            return
        if event is not None:
            self._hear(event)
