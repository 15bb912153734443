"""Runs on this machine without Ray: the real controller, the real engine, processes and pipes between them."""

import queue
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from evenkeel.control import messages as m
from evenkeel.control.controller import Controller
from evenkeel.control.policy import Policy
from evenkeel.core.ids import INITIAL, WorkerId
from evenkeel.core.layout import Layout, WorkerInfo
from evenkeel.core.world import World
from evenkeel.engine.fleet import Fleet
from evenkeel.engine.job import Job


@dataclass(slots=True)
class Outcome:
    """What a run left: the lines of metrics.jsonl and events.jsonl, the journal, and who was there."""

    status: str = ""
    error: str = ""
    metrics: list[m.Metrics] = field(default_factory=list)
    events: list[m.Log] = field(default_factory=list)
    journal: list[m.Entry] = field(default_factory=list)
    ready: dict[WorkerId, WorkerInfo] = field(default_factory=dict)

    @property
    def losses(self) -> list[float | None]:
        return [line.vote.loss for line in self.metrics]

    @property
    def worlds(self) -> list[World]:
        return [entry.world for entry in self.journal if isinstance(entry, m.WorldOpened)]

    def named(self, event: str) -> list[m.Log]:
        return [line for line in self.events if line.event == event]


class LocalRun:
    """One run with its controller, driven to its end by `run`. The journal is kept in memory.

    Args:
        make_job: see Fleet.
        not_before: by number of a worker, in order of starting from 0: the step that must be visible before it starts.
        watch: called after each event that the controller has heard; may call `stop` and `fleet.signal`.
    """

    def __init__(
        self,
        make_job: Callable[[WorkerId], Job],
        policy: Policy,
        *,
        threads: int = 1,
        device: str = "cpu",
        not_before: Mapping[int, int] | None = None,
        watch: "Callable[[LocalRun, m.Event], None] | None" = None,
    ) -> None:
        self.fleet = Fleet(make_job, threads=threads, device=device)
        self.outcome = Outcome()
        self._controller = Controller(policy)
        self._not_before = dict(not_before or {})
        self._watch = watch
        self._timer: float | None = None
        self._started = 0
        self._to_start = 0

    def run(self) -> Outcome:
        """Runs to the end and ends every process."""
        try:
            self._feed(m.Started())
            while not self.outcome.status:
                self._feed(self._next())
        finally:
            self.fleet.close()
        return self.outcome

    def stop(self, reason: str) -> None:
        """Asks the run to stop after the next step. From any thread."""
        self.fleet.events.put(m.StopRequested(reason))

    def member(self, rank: int) -> WorkerId:
        """Who has this rank in the newest world."""
        return self.outcome.worlds[-1].layout.members[rank]

    def _next(self) -> m.Event:
        try:
            limit = None if self._timer is None else max(0.0, self._timer - time.monotonic())
            return self.fleet.events.get(timeout=limit)
        except queue.Empty:
            self._timer = None
            return m.Tick()

    def _feed(self, event: m.Event) -> None:
        if isinstance(event, m.WorkerReady):
            self.outcome.ready[event.worker.worker_id] = event.worker
        output = self._controller.step(time.monotonic(), event)
        self.outcome.journal.extend(output.journal)
        for command in output.commands:
            self._carry_out(command)
        if self._watch is not None:
            self._watch(self, event)

    def _carry_out(self, command: m.Command) -> None:
        match command:
            case m.Abort() | m.Settle() | m.Form() | m.Request() | m.Probe():
                self.fleet.send(command)
            case m.Kill(worker_id, _):
                self.fleet.signal(worker_id)
            case m.Start(count):
                self._to_start += count
                self._start()
            case m.SetTimer(at):
                self._timer = at
            case m.Metrics():
                self._committed(command)
            case m.Log():
                self.outcome.events.append(command)
            case m.Status():
                pass
            case m.End(status, error):
                self.outcome.status, self.outcome.error = status, error

    def _committed(self, line: m.Metrics) -> None:
        self.outcome.metrics.append(line)
        world = self.outcome.worlds[-1]
        spares = [w for w in self.outcome.ready if w not in world.layout.places]
        for worker in (world.leader, *spares):
            self.fleet.acknowledge(worker, line.vote.step)
        self._start()

    def _start(self) -> None:
        visible = self.outcome.metrics[-1].vote.step if self.outcome.metrics else 0
        while self._to_start and self._not_before.get(self._started, 0) <= visible:
            self.fleet.start()
            self._started += 1
            self._to_start -= 1


def run_static(
    make_job: Callable[[WorkerId], Job],
    workers: int,
    layout_of: Callable[[Sequence[WorkerId]], Layout],
    last_step: int,
    *,
    threads: int = 1,
    device: str = "cpu",
    copies: int | None = None,
    checkpoint_every: int | None = None,
) -> tuple[m.Report, ...]:
    """The same engine in a fixed layout, without controller and heartbeat: what fault tolerance is measured against.

    Args:
        copies, checkpoint_every: see World. Parts of checkpoints are written, but nobody completes them.

    Returns:
        The leader's reports, one per step.

    Raises:
        RuntimeError: if a worker dies or its training code raises.
    """
    fleet = Fleet(make_job, threads=threads, device=device, static=True)
    try:
        ids = [fleet.start() for _ in range(workers)]
        infos: dict[WorkerId, WorkerInfo] = {}
        while len(infos) < workers:
            match fleet.events.get():
                case m.WorkerReady(info):
                    infos[info.worker_id] = info
                case other:
                    raise RuntimeError(f"while starting: {other}")
        world = static_world([infos[w] for w in ids], layout_of(ids), last_step)
        world = replace(world, copies=copies, checkpoint_every=checkpoint_every)
        for worker in world.layout.members:
            fleet.send(m.Form(worker, 1, world))
        return _collect(fleet)
    finally:
        fleet.close()


def static_world(infos: Sequence[WorkerInfo], layout: Layout, last_step: int) -> World:
    """A first world of these workers that begins from the initial state."""
    by_id = {info.worker_id: info for info in infos}
    return World(
        generation=1,
        layout=layout,
        base=INITIAL,
        members=tuple(by_id[w] for w in layout.members),
        sources=(),
        nodes=tuple((w, by_id[w].node_id) for w in layout.members),
        last_step=last_step,
        cause="start",
        reason="a fixed layout",
    )


def _collect(fleet: Fleet) -> tuple[m.Report, ...]:
    reports: list[m.Report] = []
    while True:
        match fleet.events.get():
            case m.Reported(_, news):
                reports += news
            case m.Finished():
                return tuple(reports)
            case m.Failed() | m.WorkerLost() as trouble:
                raise RuntimeError(f"a static run has broken: {trouble}")
            case _:
                pass
