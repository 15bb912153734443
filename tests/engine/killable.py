"""Runs of which everything can be killed, without Ray: the controller is a process of its own, on a real run directory.

Real are the controller, the shell around it, all that it writes down, the store and the workers. The test's process
stands for Ray: it carries messages between them, starts workers, hears of deaths, and starts the controller anew.
"""

import os
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from left import alive
from tiny import wait_for_file, wait_for_mirrors

from evenkeel.control import messages as m
from evenkeel.control.controller import Controller
from evenkeel.core.ids import Version, WorkerId
from evenkeel.core.layout import WorkerInfo
from evenkeel.engine.faults import LOAD, MIRROR_PHASES, FaultPlan
from evenkeel.engine.fleet import Fleet
from evenkeel.engine.job import Job
from evenkeel.runtime import saving
from evenkeel.runtime.job import JobMaker
from evenkeel.runtime.record import RunRecord
from evenkeel.runtime.shell import Shell, ToWorker
from evenkeel.runtime.spec import RunSpec
from evenkeel.store.checkpoints import Checkpoints
from evenkeel.store.files import LocalFiles, Sink
from evenkeel.store.run_directory import RunDirectory

HALF, MANIFEST, VISIBLE = "half", "manifest", "visible"
WHOLE, GATE, WAIT, HOLD, RANKS = 5_000, 10_000, 15_000, 20_000, 100
"""Faults with such an index are none: who reaches them waits for its last mirror, at a gate, until a stop is over, or
at a stop."""
POLL_S = 0.002
HIGH = 1_000_000


@dataclass(frozen=True)
class Stop:
    """A moment at which processes are held, and then killed, all at once.

    Attributes:
        phase: of the engine's faults; or HALF, when half of a worker's part is written; or of the controller MANIFEST,
            when all parts are there and it is about to make the checkpoint visible, and VISIBLE, when it has done so
            and does not know it yet.
        step: of the checkpoint or mirror; of no meaning for LOAD, which is the first one after the stop before.
        ranks: are held there (but in MANIFEST and VISIBLE), and killed if `ranks_die`.
        everyone: every worker is killed.
        controller: it is killed, wherever it is.
    """

    phase: str
    step: int
    ranks: tuple[int, ...] = ()
    ranks_die: bool = True
    everyone: bool = False
    controller: bool = False

    @property
    def kills_workers(self) -> bool:
        return self.everyone or (self.ranks_die and bool(self.ranks))

    @property
    def holds_controller(self) -> bool:
        return self.phase in (MANIFEST, VISIBLE)


@dataclass(frozen=True)
class Stops:
    """All stops of a run, and the files in which processes say that they are held, and hear that they are not.

    Attributes:
        mirrors: ranks below this come to a stop only with their mirrors whole: nobody goes into its step, nor into the
            `mirror_every` before it, while its last one is under way.
    """

    folder: Path
    stops: tuple[Stop, ...]
    mirrors: int = 0
    mirror_every: int = 0

    def gate(self, stop: int) -> Path | None:
        """Exists once the run may go on to that stop; None if nothing holds it before."""
        return None if self.stops[stop].phase == LOAD else self.folder / f"{stop}-gate"

    def at_gate(self, stop: int) -> Path:
        """Exists once the run waits at the gate, after all that came before it."""
        return self.folder / f"{stop}-at-gate"

    def wait_at_gate(self, stop: int) -> None:
        """Whoever comes while processes are still held at the stop before goes on if that breaks its world."""
        if stop and not self.over(stop - 1).exists():
            wait_for_file(self.over(stop - 1))
            if self.stops[stop - 1].kills_workers:
                return
        self.at_gate(stop).touch()
        gate = self.gate(stop)
        assert gate is not None
        wait_for_file(gate)

    def over(self, stop: int) -> Path:
        return self.folder / f"{stop}-over"

    def held(self, stop: int) -> dict[str, int]:
        """By rank the processes that are held; by "controller" the step of the checkpoint that it is held in."""
        return {path.name.split("-")[2]: int(path.read_text() or 0) for path in self.folder.glob(f"{stop}-held-*")}

    def is_next(self, stop: int) -> bool:
        return not self.over(stop).exists() and (stop == 0 or self.over(stop - 1).exists())

    def hold(self, stop: int, who: str, number: int) -> None:
        """Returns when the stop is over, to whoever is still there."""
        half = self.folder / f"{stop}-half-{who}"
        half.write_text(str(number))
        half.rename(self.folder / f"{stop}-held-{who}")
        wait_for_file(self.over(stop))

    def plans(self) -> Iterator[FaultPlan]:
        for number, stop in enumerate(self.stops):
            if self.gate(number) is not None:
                yield FaultPlan(GATE + number, stop.step - 1, "forward", "rank:0", "exception")
            for step in range(stop.step - self.mirror_every, stop.step + 1):
                for rank in range(self.mirrors):
                    yield FaultPlan(WHOLE, step, "forward", f"rank:{rank}", "exception")
            if stop.phase in MIRROR_PHASES:
                # While a mirror's threads are held the training goes on. It gets to no checkpoint: nobody would go back
                # to mirrors if there were a newer one.
                yield FaultPlan(WAIT + number, stop.step + self.mirror_every, "forward", "rank:0", "exception")
            phase = "write" if stop.phase == HALF else stop.phase
            step = 1 if stop.phase == LOAD else stop.step
            for rank in () if stop.holds_controller else stop.ranks:
                yield FaultPlan(HOLD + RANKS * number + rank, step, phase, f"rank:{rank}", "exception")


# ---------------------------------------------------------------- workers


@dataclass(frozen=True)
class Held:
    """Makes the product's own jobs, which are held at stops."""

    maker: JobMaker
    stops: Stops

    def __call__(self, worker_id: WorkerId) -> Job:
        job = self.maker(worker_id)
        return replace(job, settings=replace(job.settings, faults=tuple(self.stops.plans())), fault_once=self._meet)

    def _meet(self, index: int) -> bool:
        if index < GATE:
            wait_for_mirrors()
            return False
        if index < WAIT:
            self.stops.wait_at_gate(index - GATE)
            return False
        if index < HOLD:
            wait_for_file(self.stops.over(index - WAIT))
            return False
        stop, rank = divmod(index - HOLD, RANKS)
        if self.stops.is_next(stop):
            hold = partial(self.stops.hold, stop, str(rank), os.getpid())
            if self.stops.stops[stop].phase == HALF:
                _interrupt_next_stream(hold)
            else:
                hold()
        return False


def _interrupt_next_stream(hold: Callable[[], None]) -> None:
    """In this worker process: the next file that is streamed is held with some of its bytes written."""
    whole = LocalFiles.stream

    @contextmanager
    def stream(files: LocalFiles, name: str) -> Iterator[Sink]:
        LocalFiles.stream = whole
        with whole(files, name) as sink:
            yield _HalfWay(sink, hold)

    LocalFiles.stream = stream


class _HalfWay:
    """Holds after a file's header and the first of what follows."""

    def __init__(self, sink: Sink, hold: Callable[[], None]) -> None:
        self._sink, self._hold, self._writes = sink, hold, 0

    def write(self, data: bytes | memoryview) -> None:
        self._sink.write(data)
        self._writes += 1
        if self._writes == 2:
            self._hold()


# ---------------------------------------------------------------- the controller


@dataclass(frozen=True)
class Heard:
    """One more event was heard, and all that follows from it is durable and has been said."""


@dataclass(frozen=True)
class Told:
    """A line of metrics.jsonl or events.jsonl."""

    kind: str
    line: dict[str, Any]


def control(pipe: "Connection[Any, Any]", spec: RunSpec, stops: Stops, alive: tuple[WorkerInfo, ...]) -> None:
    """The process of one life of the controller."""
    Life(pipe, spec, stops).run(alive)


class Life:
    """Implements shell.Hands: what the shell wants done goes over the pipe."""

    def __init__(self, pipe: "Connection[Any, Any]", spec: RunSpec, stops: Stops) -> None:
        self._pipe, self._spec, self._stops = pipe, spec, stops
        self._run = RunDirectory.at(spec.folder)
        self._events: queue.SimpleQueue[tuple[m.Event, bool]] = queue.SimpleQueue()
        self._timer: float | None = None
        self._end: m.End | None = None

    def run(self, alive: tuple[WorkerInfo, ...]) -> None:
        spec = self._spec
        record = RunRecord(self._run, spec.global_batch, spec.lr, self._tell, Path(spec.folder) / "logs")
        past = record.begin(spec.policy)
        controller = Controller(spec.policy, past.epoch + 1, past.entries, past.shown)
        shell = Shell(controller, record, self, time.monotonic, self._ended)
        threading.Thread(target=self._listen, daemon=True).start()
        saved, damaged = saving.find(self._run)
        shell.feed(m.Started(alive, saved, damaged, None))
        while self._end is None:
            event, carried = self._next()
            shell.feed(event)
            if carried:
                self._pipe.send(Heard())
        self._pipe.send(self._end)

    def _listen(self) -> None:
        with suppress(EOFError):
            while True:
                self._events.put((self._pipe.recv(), True))
        os._exit(0)  # the test is over

    def _next(self) -> tuple[m.Event, bool]:
        try:
            limit = None if self._timer is None else max(0.0, self._timer - time.monotonic())
            return self._events.get(timeout=limit)
        except queue.Empty:
            self._timer = None
            return m.Tick(), False

    def _tell(self, kind: str, line: dict[str, Any]) -> None:
        self._pipe.send(Told(kind, line))

    def _ended(self, end: m.End) -> None:
        self._end = end

    def send(self, command: ToWorker) -> None:
        self._pipe.send(command)

    def start(self, count: int) -> None:
        self._pipe.send(m.Start(count))

    def kill(self, worker: WorkerId, reason: str) -> None:
        self._pipe.send(m.Kill(worker, reason))

    def committed(self, step: int) -> None:
        """The metrics line says so."""

    def set_timer(self, at: float) -> None:
        self._timer = at

    def commit_checkpoint(self, command: m.CommitCheckpoint) -> None:
        threading.Thread(target=self._complete, args=(command,), daemon=True).start()

    def _complete(self, command: m.CommitCheckpoint) -> None:
        self._pass(MANIFEST, command.version)
        event = saving.complete(self._run, self._spec, command)
        self._pass(VISIBLE, command.version)
        self._events.put((event, False))

    def look_at(self, command: m.LookAt) -> None:
        look = partial(saving.look, self._run, command)
        threading.Thread(target=lambda: self._events.put((look(), False)), daemon=True).start()

    def _pass(self, phase: str, version: Version) -> None:
        for number, stop in enumerate(self._stops.stops):
            if stop.phase == phase and stop.step <= version.step and self._stops.is_next(number):
                self._stops.hold(number, "controller", version.step)


# ---------------------------------------------------------------- all of it


@dataclass(frozen=True)
class Struck:
    """What there was when the processes of a stop were dead.

    Attributes:
        before: the newest complete checkpoint when the run came near the stop.
        at: the one that was being written; the mirror, if it was one; of no meaning, and high, in a load.
        newest: the newest complete checkpoint in the end.
        damage: what was wrong with the complete ones.
        died: the workers.
        restored: how often the run had gone back before.
        heal_s: until the next step was visible.
    """

    stop: Stop
    before: int
    at: int
    newest: int
    damage: tuple[str, ...]
    died: frozenset[WorkerId]
    restored: int
    heal_s: float = 0.0


class KillableRun:
    """One run, through all of its stops.

    Args:
        specs: of the lives of the controller, one after another, and again from the first; equal but for the layout.
    """

    PATIENCE_S = 120.0
    """Without any news the test fails: it says that something hangs, never that it is slow."""

    def __init__(self, specs: Sequence[RunSpec], maker: JobMaker, stops: Stops) -> None:
        self._specs = specs
        self._stops = stops
        self._directory = RunDirectory.at(specs[0].folder)
        self._fleet = Fleet(Held(maker, stops))
        self._inbox: queue.SimpleQueue[Any] = self._fleet.events
        self._lives = 0
        self._unheard: deque[tuple[WorkerId, m.Event]] = deque()
        self._started: list[WorkerId] = []
        self._coming = 0
        self._ready: dict[WorkerId, WorkerInfo] = {}
        self._lost: set[WorkerId] = set()
        self._forgotten: set[WorkerId] = set()
        self._restored = 0
        self._step = self._generation = self._broken = 0
        self._members = 0
        self._uploads: set[int] = set()
        self._near: dict[int, int] = {}
        self._healing = 0.0
        self.struck: list[Struck] = []
        self.end: m.End | None = None

    def run(self) -> m.End:
        """To its end; every process is gone then."""
        try:
            self._begin_life()
            news_at = time.monotonic()
            while self.end is None:
                with suppress(queue.Empty):
                    self._take(self._inbox.get(timeout=0.02))
                    news_at = time.monotonic()
                self._look()
                assert time.monotonic() < news_at + self.PATIENCE_S, f"nothing happens any more: {self._where()}"
            return self.end
        finally:
            self._end_life()
            self._fleet.close()

    def _where(self) -> str:
        return f"step {self._step}, stop {len(self.struck)}, held {self._stops.held(len(self.struck))}"

    # ------------------------------------------------------------ in place of Ray

    def _begin_life(self) -> None:
        spec = self._specs[self._lives % len(self._specs)]
        self._lives += 1
        self._uploads.clear()
        self._members = spec.policy.wish.max_workers
        self._coming = sum(w not in self._ready and w not in self._lost for w in self._started)
        self._pipe, theirs = get_context("forkserver").Pipe()
        here = tuple(info for worker, info in sorted(self._ready.items()) if worker not in self._lost)
        arguments = (theirs, spec, self._stops, here)
        self._process = get_context("forkserver").Process(target=control, args=arguments, daemon=True)
        self._process.start()
        theirs.close()
        self._reader = threading.Thread(target=self._read, args=(self._pipe,), daemon=True)
        self._reader.start()
        for _, event in self._unheard:
            self._pipe.send(event)

    def _read(self, pipe: "Connection[Any, Any]") -> None:
        with suppress(EOFError, OSError):
            while True:
                self._inbox.put(pipe.recv())

    def _end_life(self) -> None:
        self._process.kill()
        self._process.join()
        self._reader.join()
        self._pipe.close()
        self._process.close()

    def _drain(self) -> None:
        """What a dead life has said and nobody has heard is lost, but for what it had done before."""
        events: list[m.Event] = []
        with suppress(queue.Empty):
            while True:
                item = self._inbox.get_nowait()
                if isinstance(item, Heard | Told):
                    self._take(item)
                elif isinstance(item, m.Event):
                    events.append(item)
        for event in events:
            self._inbox.put(event)

    def _take(self, item: Any) -> None:
        match item:
            case Heard():
                self._unheard.popleft()
            case Told(kind, line):
                self._note(kind, line)
            case m.End():
                self.end = item
            case m.Start(count):
                already = min(count, self._coming)
                self._coming -= already
                self._started += [self._fleet.start() for _ in range(count - already)]
            case m.Kill(worker, _):
                self._fleet.signal(worker)
            case m.Abort() | m.Settle() | m.Form() | m.Request() | m.Probe():
                self._fleet.send(item)
            case _:
                self._carry(item)

    def _carry(self, event: m.Event) -> None:
        """What a worker says, or what is to be heard of it."""
        worker = event.worker.worker_id if isinstance(event, m.WorkerReady) else event.worker_id
        if isinstance(event, m.WorkerLost):
            self._lost.add(worker)
        if worker in self._forgotten:
            return
        if isinstance(event, m.WorkerReady):
            self._ready[worker] = event.worker
        self._unheard.append((worker, event))
        with suppress(OSError):  # the next life hears it
            self._pipe.send(event)

    def _note(self, kind: str, line: dict[str, Any]) -> None:
        if kind == "metrics":
            self._step, self._generation = line["step"], line["generation"]
            if self._healing and line["generation"] > self._broken:
                self.struck[-1] = replace(self.struck[-1], heal_s=time.monotonic() - self._healing)
                self._healing = 0.0
            for worker in self._ready.keys() - self._lost:
                self._fleet.acknowledge(worker, self._step)
        elif line.get("event") == "restored":
            self._restored += 1
            self._step = line["base"]
        elif line.get("event") == "checkpoint_started":
            self._uploads.add(line["checkpoint"])
        elif line.get("event") in ("checkpoint_committed", "checkpoint_failed"):
            self._uploads -= {step for step in self._uploads if step <= line["checkpoint"]}

    # ------------------------------------------------------------ stops

    def _look(self) -> None:
        number = len(self.struck)
        if number == len(self._stops.stops):
            return
        stop, gate = self._stops.stops[number], self._stops.gate(number)
        if number not in self._near:
            if gate is None:
                self._near[number] = self._newest()
            elif self._stops.at_gate(number).exists() and self._is_quiet(stop.step):
                self._near[number] = self._newest()
                gate.touch()
        else:
            expected = {"controller"} if stop.holds_controller else {str(rank) for rank in stop.ranks}
            held = self._stops.held(number)
            if held.keys() == expected:
                self._strike(number, stop)

    def _is_quiet(self, step: int) -> bool:
        """Whether all before the gate is visible, no checkpoint is being written, and everybody is there."""
        there = len(self._ready.keys() - self._lost)
        return self._step >= step - 2 and not self._uploads and there >= self._members

    def _newest(self) -> int:
        good, _ = Checkpoints(self._directory.files).newest_first()
        return good[0].manifest.version.step if good else 0

    def _damage(self) -> tuple[str, ...]:
        checkpoints = Checkpoints(self._directory.files)
        damaged = [str(error) for error in checkpoints.newest_first()[1].values()]
        looked = [checkpoints.look(step, thorough=True) for step in checkpoints.steps() if not damaged]
        return *damaged, *(str(error) for one in looked if one is not None for error in one[1])

    def _strike(self, number: int, stop: Stop) -> None:
        held = self._stops.held(number)
        victims = self._victims(stop, held)
        if stop.controller:
            self._process.kill()
        for worker in victims:
            self._fleet.signal(worker)
        if stop.controller:
            self._end_life()
            self._drain()
        while any(alive(self._fleet.pid(worker)) for worker in victims):
            time.sleep(POLL_S)
        newest, texts = self._newest(), self._damage()  # a controller that lives goes on removing old ones
        at = HIGH if stop.phase == LOAD else held.get("controller", stop.step)
        near = self._near[number]
        self.struck.append(Struck(stop, near, at, newest, texts, frozenset(victims), self._restored))
        following = self._stops.stops[number + 1 : number + 2]
        self._healing = 0.0 if following and following[0].phase == LOAD else time.monotonic()
        self._broken = self._generation if stop.kills_workers else 0
        self._stops.over(number).touch()
        if stop.controller:
            # The next life finds who is there; of the others it has never heard.
            self._lost |= victims
            self._forgotten |= victims
            self._unheard = deque((worker, event) for worker, event in self._unheard if worker not in victims)
            self._begin_life()

    def _victims(self, stop: Stop, held: dict[str, int]) -> set[WorkerId]:
        there = {worker for worker in self._started if worker not in self._lost}
        if stop.everyone or not stop.ranks_die:
            return there if stop.everyone else set()
        pids = set(held.values())
        if stop.holds_controller:
            pids = {one["pid"] for one in self._directory.read_worlds()[-1]["members"] if one["rank"] in stop.ranks}
        return {worker for worker in there if self._fleet.pid(worker) in pids}
