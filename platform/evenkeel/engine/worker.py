"""One worker: a training thread that runs worlds, and control threads that break, settle and ask (section 4)."""

import os
import queue
import sys
import threading
import time
from collections.abc import Callable
from typing import NoReturn

import torch

from evenkeel.control import messages as m
from evenkeel.core.ids import INITIAL, NodeId, Version, WorkerId
from evenkeel.core.layout import WorkerInfo
from evenkeel.core.vote import Vote
from evenkeel.core.world import World
from evenkeel.engine.allocator import keep_freed_memory
from evenkeel.engine.faults import Faults
from evenkeel.engine.final import finish
from evenkeel.engine.groups import GroupAborted, GroupBroken, GroupSet
from evenkeel.engine.holdings import Holdings
from evenkeel.engine.job import CheckpointError, Job
from evenkeel.engine.memory import Usage, device_bytes
from evenkeel.engine.mirror import Mirrors
from evenkeel.engine.progress import AbortedError, Progress
from evenkeel.engine.rendezvous import StoreServer
from evenkeel.engine.saver import Saver
from evenkeel.engine.seat import Seat
from evenkeel.engine.slowdown import Slowdown, slowdown_for
from evenkeel.engine.step import DivergedError, commit, train_step
from evenkeel.engine.told import Clean, first_line, print_traceback
from evenkeel.engine.training import Training, group_specs
from evenkeel.plan.memory import state_bytes

ToWorker = m.Abort | m.Settle | m.Form | m.Request | m.Probe
COMMIT_FAILED = 70
"""Exit status of a worker whose commit raised: what it holds is torn, so it is dead (rule 8)."""


class Worker:
    """Takes commands from control threads, several at once, and runs worlds on a thread of its own.

    Args:
        send: takes Reported, Failed, Joined and Finished from the training thread; must not block.
        host: where other workers reach this one's rendezvous store.
    """

    def __init__(
        self,
        worker_id: WorkerId,
        node_id: NodeId,
        job: Job,
        send: Callable[[m.Event], None],
        *,
        host: str = "127.0.0.1",
        device: str = "cpu",
    ) -> None:
        self._id = worker_id
        self._node = node_id
        self._job = job
        self._send = send
        self._device = torch.device(device)
        keep_freed_memory()
        job.prepare()
        self._store = StoreServer(host)
        self._seat = Seat(worker_id)
        self._progress = Progress()
        self._faults = Faults(worker_id, job.settings.faults, job.fault_once, lambda: self._holdings.current.flip())
        self._holdings = Holdings(job, self._device)
        self._saver = Saver(worker_id, job, self._faults, send)
        self._mirrors = Mirrors(worker_id, job.shape, self._seat, self._faults)
        self._slowdown: Slowdown | None = None
        self._groups: GroupSet | None = None
        self._aborts = 0
        self._tasks: queue.SimpleQueue[World | Vote | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="train", daemon=True)
        self._thread.start()

    def info(self) -> WorkerInfo:
        return worker_info(self._id, self._node, self._device, self._store)

    def deliver(self, command: ToWorker) -> m.Event | None:
        """Carries out a command of the controller; from control threads, several at once.

        Abort and Settle block until the training thread has parked and answer then, or give None if they are refused.
        Form and Request give None at once; a Probe is answered at once, whatever the training thread does.
        """
        with self._seat.changed:
            anew = self._seat.member.meet(command.epoch)
        if anew:
            self._saver.tell_again()
        match command:
            case m.Abort():
                return self._abort(command)
            case m.Settle():
                return self._settle(command)
            case m.Form(_, epoch, world):
                with self._seat.changed:
                    if self._seat.member.form(epoch, world):
                        self._tasks.put(world)
                return None
            case m.Request(_, epoch, generation, flags):
                with self._seat.changed:
                    self._seat.member.request(epoch, generation, flags)
                return None
            case m.Probe(_, _, probe):
                return m.Located(self._id, probe, self._progress.position())

    def acknowledge(self, step: int) -> None:
        """The controller has made steps up to `step` durable. Told to leaders, and to spares."""
        with self._seat.changed:
            self._seat.member.acknowledge(step)
            self._seat.changed.notify_all()
        self._faults.idle(step)

    def close(self) -> None:
        """Ends the training thread, in whatever generation it is, and the store."""
        with self._seat.changed:
            self._seat.member.floor = sys.maxsize
            self._seat.changed.notify_all()
            groups = self._groups
        if groups is not None:
            groups.abort()
        self._tasks.put(None)
        self._thread.join()
        self._saver.close()
        self._mirrors.close()
        self._store.close()

    # ------------------------------------------------------------ control threads

    def _abort(self, command: m.Abort) -> m.Answered | None:
        """The floor is raised before anything is broken (rule 2); the answer comes after parking (rule 1).

        Who is slow to park is asked again: only the last command answers, so that they do not take up all threads.
        """
        seat = self._seat
        with seat.changed:
            if not seat.member.abort(command.epoch, command.generation, command.acknowledged):
                return None
            self._aborts += 1
            mine = self._aborts
            seat.changed.notify_all()
            groups = self._groups
        if groups is not None:
            groups.abort()
        with seat.changed:
            seat.changed.wait_for(
                lambda: seat.member.parked or seat.member.floor != command.generation + 1 or self._aborts != mine
            )
            answer = seat.member.answer(command.generation, self._progress.position())
        return None if answer is None else m.Answered(self._id, command.generation, command.ask, answer)

    def _settle(self, command: m.Settle) -> m.Settled | None:
        seat = self._seat
        with seat.changed:
            settlement = seat.member.settle(command.epoch, command.decision)
            if not settlement.accepted:
                return None
            if settlement.commit is not None:
                self._tasks.put(settlement.commit)
            seat.changed.wait_for(lambda: seat.member.parked)
            return m.Settled(self._id, command.decision.generation, command.ask, seat.member.holdings)

    # ------------------------------------------------------------ training thread

    def _run(self) -> None:
        while (task := self._tasks.get()) is not None:
            if isinstance(task, Vote):
                self._commit(task)
                self._park()
            else:
                self._run_world(task)

    def _run_world(self, world: World) -> None:
        try:
            training = self._join(world)
            self._steps(training)
        except (AbortedError, GroupAborted):
            self._break_groups()
        except CheckpointError as error:
            text = self._job.clean(str(error))
            self._send(m.CheckpointUnreadable(self._id, world.generation, world.base, text, error.file))
            self._break_groups()
        except BaseException as error:  # the border of the thread, also for sys.exit(): the controller decides
            # Told before the groups break, for that makes others fail and the controller abort, and before parking, so
            # that it comes ahead of the answer: else the first error would pass for somebody else's broken collective.
            if self._seat.running(world.generation):
                self._send(m.Failed(self._id, world.generation, self._describe(error)))
            self._break_groups()
        if self._device.type == "cuda":
            self._synchronize()
        self._park()

    def _join(self, world: World) -> Training:
        """Meets the others, gets the state that this world begins from, and says so."""
        begun = time.monotonic()
        self._faults.joining(world)
        self._slowdown = self._slowdown or slowdown_for(self._id, world, self._job.settings, self._device)
        self._progress.begin(world.generation, world.base.step, lambda: self._seat.running(world.generation))
        self._progress.enter("regroup")
        groups = self._regroup(world)
        regrouped = time.monotonic()
        self._faults.recovering(world)
        self._progress.enter("reshard")
        seat = self._seat
        mirrored = self._mirrors.of(world.base)
        memory = self._holdings.reshard(world, self._id, seat, mirrored, groups.world, self._progress)
        self._faults.loaded(world)
        with seat.changed:
            self._progress.check()
            seat.member.resharded(memory.state.shard, world.base)
            self._holdings.adopt(memory, seat.member.trained)
        self._send(m.Joined(self._id, world.generation, regrouped - begun, time.monotonic() - regrouped))
        with self._progress.communicating():
            # Nobody begins a step before all have their state and have said so: whoever it came from may be killed by
            # that step, which is to be counted against it.
            groups.world.barrier()
        training = Training(
            self._job, world, self._id, memory, groups, seat, self._progress, self._faults, self._saver, self._mirrors,
            self._slowdown, self._send,
        )  # fmt: skip
        if world.checkpoint_every is not None:
            self._saver.begin(memory.state, world.layout, training.copies)
        if world.mirror_every is not None:
            self._mirrors.begin(world, training.copies)
            if world.base != INITIAL:
                self._mirrors.copy(world.base, memory.state, groups)
        return training

    def _steps(self, training: Training) -> None:
        world = training.world
        usage = Usage(self._device)
        for step in range(world.base.step + 1, world.last_step + 1):
            self._seat.wait_for_room(world.generation)
            vote = train_step(training, step)
            self._commit(vote)
            if step == world.base.step + 1:
                self._tell_memory(training, usage)
                if world.mirror_every is None:
                    self._mirrors.free()  # of earlier generations
            if vote.mirrors:
                version = Version(vote.step, vote.generation)
                self._mirrors.copy(version, training.memory.state, training.groups)
            if self._seat.member.leaves(vote):
                return
        finished = self._seat.finished(finish(training))
        if finished is not None:
            self._send(finished)
        with self._progress.communicating():
            training.groups.world.barrier()  # nobody is found parked while the leader still writes

    def _tell_memory(self, training: Training, usage: Usage) -> None:
        """After the first step, which has seen the most activations that there are at once."""
        takes = state_bytes(self._job.shape, training.memory.state.shard, self._job.settings.precision)
        peak, activations = usage.measured()
        has = device_bytes(self._device)
        self._send(m.MemoryUsed(self._id, takes.params, takes.grads, takes.optimizer, activations, peak, has))

    def _commit(self, vote: Vote) -> None:
        """Also for a step that is settled after its world broke. Whoever fails in it holds torn state (rule 8)."""
        self._progress.phase = "commit"
        try:
            self._holdings.keep(self._seat.member.trained)
            report = commit(self._holdings.current, self._job.settings, vote, self._seat, self._faults)
            if report is not None:
                self._send(report)
            if vote.saves:
                self._faults.fire("save", vote.step)
                world = self._seat.member.world
                assert world is not None
                self._saver.copy(Version(vote.step, vote.generation), last=vote.step == world.last_step)
        except BaseException:
            _die(self._job.clean)

    def _regroup(self, world: World) -> GroupSet:
        """New groups; those of the last generation are dropped. An abort that comes meanwhile breaks these too."""
        self._break_groups()
        specs = group_specs(world.layout, self._job.shape)
        groups = GroupSet(world.generation, self._id, world.members, specs, self._store)
        with self._seat.changed:
            self._groups = groups
        self._progress.check()
        with self._progress.communicating():
            groups.connect()
        return groups

    def _break_groups(self) -> None:
        """Frees the others, which may be blocked by what this worker will not send, within milliseconds."""
        with self._seat.changed:
            groups, self._groups = self._groups, None
        if groups is not None:
            groups.abort()
            self._mirrors.wait()
            groups.close()

    def _park(self) -> None:
        self._progress.park()
        self._seat.park()

    def _synchronize(self) -> None:
        """Nothing that was queued may still write after parking (rule 2). A device error here means dead."""
        try:
            torch.cuda.synchronize(self._device)
        except RuntimeError:
            _die(self._job.clean)

    def _describe(self, error: BaseException) -> m.Fault:
        broken = isinstance(error, GroupBroken | DivergedError)
        if not broken:
            print_traceback(self._job.clean)
        at = self._progress
        open_step = at.step + (at.phase in ("regroup", "reshard", "finish"))
        layer = "" if at.layer < 0 else self._job.shape.layers[at.layer].name
        text = first_line(f"{type(error).__name__}: {error}", self._job.clean)
        return m.Fault(open_step, at.phase, at.micro, layer, text, broken)


def worker_info(worker_id: WorkerId, node_id: NodeId, device: torch.device, store: StoreServer) -> WorkerInfo:
    """What this process says of itself."""
    cuda = device.type == "cuda"
    return WorkerInfo(
        worker_id=worker_id,
        node_id=node_id,
        pid=os.getpid(),
        device=device.type,
        kind=torch.cuda.get_device_name(device) if cuda else "cpu",
        memory=device_bytes(device),
        visible_devices=os.environ.get("CUDA_VISIBLE_DEVICES", "") if cuda else "",
        store_host=store.host,
        store_port=store.port,
    )


def _die(clean: Clean) -> NoReturn:
    """After an error that leaves torn state behind. It dies also where the error cannot be printed: on a full disk."""
    try:
        print_traceback(clean)
    finally:
        os._exit(COMMIT_FAILED)
