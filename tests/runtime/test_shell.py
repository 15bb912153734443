"""The order in which the shell does things, and what the record leaves in a run directory. No Ray here."""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from evenkeel.control import messages as m
from evenkeel.control.controller import Controller
from evenkeel.control.entries import Shown
from evenkeel.control.policy import Policy
from evenkeel.core.codec import load
from evenkeel.core.ids import NodeId, WorkerId
from evenkeel.core.layout import WorkerInfo
from evenkeel.core.model import LayerShape, ModelShape, ParamShape
from evenkeel.core.vote import SLOTS, Slot, Vote
from evenkeel.plan.layout import Wish
from evenkeel.runtime.names import number_of, worker_id, worker_name, worker_of
from evenkeel.runtime.record import Past, RunRecord
from evenkeel.runtime.shell import Shell, ToWorker
from evenkeel.runtime.trace import Trace
from evenkeel.store.errors import JournalFenced
from evenkeel.store.run_directory import RunDirectory
from evenkeel.store.run_directory import RunRecord as RunJson

MODEL = ModelShape((LayerShape("a", (ParamShape("a.w", (4,)),)),))
POLICY = Policy(MODEL, Wish(1, 1, 1, 1, 1), micro_batches=2, last_step=2)
ONE = WorkerInfo(WorkerId("w0001"), NodeId("n"), 11)


@dataclass
class Hands:
    """Notes what it is asked to do."""

    done: list[Any] = field(default_factory=list)

    def send(self, command: ToWorker) -> None:
        self.done.append(command)

    def start(self, count: int) -> None:
        self.done.append(("start", count))

    def kill(self, worker: WorkerId, reason: str) -> None:
        self.done.append(("kill", worker))

    def commit_checkpoint(self, command: m.CommitCheckpoint) -> None:
        self.done.append(("commit checkpoint", command.version.step))

    def look_at(self, command: m.LookAt) -> None:
        self.done.append(("look at", command.version.step))

    def set_timer(self, at: float) -> None:
        self.done.append("timer")

    def committed(self, step: int) -> None:
        self.done.append(("committed", step))


@dataclass
class Run:
    """A run directory with one life of a controller on it; time stands still. `url` is for one that is not local."""

    folder: Path
    url: str = ""
    hands: Hands = field(default_factory=Hands)
    published: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    ended: list[m.End] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.directory = RunDirectory.at(self.url or str(self.folder))
        if self.directory.read_run() is None:
            self.directory.write_run(RunJson("r", "starting", 1.0, 1.0))
        self.record = RunRecord(self.directory, 4, lambda step: step / 10, self.publish, self.folder)
        self.past = self.record.begin(POLICY)
        controller = Controller(POLICY, self.past.epoch + 1, self.past.entries, self.past.shown)
        self.shell = Shell(controller, self.record, self.hands, lambda: 0.0, self.ended.append)

    def publish(self, kind: str, line: dict[str, Any]) -> None:
        self.published.append((kind, line))

    def feed(self, *events: m.Event) -> int:
        return [self.shell.feed(event) for event in events][-1]


Lives = Callable[[], Run]


@pytest.fixture
def begin(tmp_path: Path) -> Iterator[Lives]:
    """Begins another life of the controller in one run directory."""
    lives: list[Run] = []

    def another() -> Run:
        lives.append(Run(tmp_path))
        return lives[-1]

    yield another
    for life in lives:
        life.record.close()


def vote(step: int) -> Vote:
    values = [0.0] * SLOTS
    values[Slot.ONES], values[Slot.STEP] = 1, step
    values[Slot.TOKENS], values[Slot.LOSS], values[Slot.GRAD_SQUARES] = 8, 4.0 / step, 64
    return Vote(1, step, tuple(values))


def reported(step: int) -> m.Reported:
    return m.Reported(ONE.worker_id, (m.Report(vote(step), 100.0 + step),))


BEGINNING = (m.Started(), m.WorkerReady(ONE), m.Joined(ONE.worker_id, 1))


def test_a_run_from_start_to_end_on_paper(begin: Lives) -> None:
    run = begin()
    assert run.feed(*BEGINNING) == 0
    assert run.feed(reported(1)) == 1
    assert run.feed(reported(2)) == 2
    run.feed(m.Finished(ONE.worker_id, 1, ()))
    assert run.ended == [m.End("finished", "")]
    first, second = run.directory.metrics()
    assert first == {
        "step": 1, "loss": 0.5, "grad_norm": 1.0, "lr": 0.1, "tokens": 8, "step_s": None, "tokens_per_s": None,
        "generation": 1, "world_size": 1, "samples": [0, 4], "time": 101.0, "checkpoint_failures": 0,
        "vote": list(vote(1).values),
    }  # fmt: skip
    assert (second["step_s"], second["tokens_per_s"], second["samples"]) == (1.0, 8.0, [4, 8])
    assert [w["members"][0]["pid"] for w in run.directory.read_worlds()] == [11]
    record = run.directory.read_run()
    assert record is not None
    assert (record.status, record.ended is not None) == ("finished", True)
    assert [line for kind, line in run.published if kind == "metrics"] == [first, second]
    assert [e["event"] for e in run.directory.events()] == ["worker_started", "world_formed"]


def test_a_decision_is_durable_before_anybody_is_told(tmp_path: Path, begin: Lives) -> None:
    run = begin()
    seen: list[list[str]] = []

    class Watching(Hands):
        def send(self, command: ToWorker) -> None:
            if isinstance(command, m.Form):
                seen.append([e["type"] for e in RunDirectory.at(str(tmp_path)).journal().read_all()])

    run.hands = Watching()
    run.shell = Shell(Controller(POLICY), run.record, run.hands, lambda: 0.0, run.ended.append)
    run.feed(*BEGINNING)
    assert seen == [["EpochBegun", "WorldOpened"]]


def test_the_next_life_goes_on_where_the_journal_ends(begin: Lives) -> None:
    begin().feed(*BEGINNING, reported(1))
    again = begin()
    assert (again.past.epoch, again.past.workers, again.past.shown.witness) == (1, 1, vote(1))
    again.feed(m.Started((ONE,)), reported(2), m.Finished(ONE.worker_id, 1, ()))
    assert again.ended == [m.End("finished", "")]
    assert [line["step"] for line in again.directory.metrics()] == [1, 2]
    assert again.directory.metrics()[-1]["step_s"] == 1.0
    third = begin()
    assert third.past.ended == m.End("finished", "")


def test_the_next_life_knows_of_the_last_checkpoint_and_of_the_hours(begin: Lives) -> None:
    values = list(vote(1).values)
    values[Slot.CHECKPOINT] = 1
    saving = Vote(1, 1, tuple(values))
    steps = [m.Reported(ONE.worker_id, (m.Report(v, at),)) for v, at in ((saving, 101.0), (vote(2), 1000.0))]
    begin().feed(*BEGINNING, *steps)
    assert begin().past.shown == Shown(vote(2), saving, 899.0), "the first step's time is not known"


def test_a_checkpoint_that_cannot_be_written_is_an_event_and_a_metric(begin: Lives) -> None:
    """Counted over all lives of the controller."""
    failed = m.Log("checkpoint_failed", 1, 0, {"checkpoint": 1, "error": "no room", "in_a_row": 1})
    first = begin()
    first.feed(*BEGINNING)
    first.record.log(failed)
    first.feed(reported(1))
    again = begin()
    again.record.log(failed)
    again.record.log(m.Log("checkpoint_started", 1, 1, {"checkpoint": 2}))
    again.feed(m.Started((ONE,)), reported(2))
    assert [line["checkpoint_failures"] for line in again.directory.metrics()] == [1, 2]


def test_a_world_whose_file_a_life_died_too_soon_for_is_written_by_the_next(begin: Lives) -> None:
    first = begin()
    first.feed(*BEGINNING)
    (world,) = first.directory.read_worlds()
    first.directory.files.remove("worlds/000001.json")
    again = begin()
    again.record.complete(again.past)
    (found,) = again.directory.read_worlds()
    assert {**found, "time": world["time"]} == world


def test_a_controller_that_lost_the_run_says_nothing_more(begin: Lives) -> None:
    old, new = begin(), begin()
    new.feed(m.Started())
    with pytest.raises(JournalFenced, match="another controller"):
        old.feed(m.Started())
    assert old.hands.done == []


def test_an_abort_acknowledges_only_what_is_durable(begin: Lives) -> None:
    run = begin()
    run.feed(*BEGINNING, reported(1))
    run.feed(m.Failed(ONE.worker_id, 1, m.Fault(2, "forward", 0, "a", "ValueError: no", False)))
    aborts = [c for c in run.hands.done if isinstance(c, m.Abort)]
    assert [a.acknowledged for a in aborts] == [1]
    assert run.record.durable == 1


def test_an_abort_finds_the_line_of_the_step_that_led_to_it(tmp_path: Path) -> None:
    """In an object store, where lines are written together: whoever is told that a step is durable forgets its vote."""
    run = Run(tmp_path, f"memory://{tmp_path.name}")
    durable: list[tuple[int, list[int]]] = []

    class Watching(Hands):
        def send(self, command: ToWorker) -> None:
            if isinstance(command, m.Abort):
                durable.append((command.acknowledged, [line["step"] for line in run.directory.metrics()]))

    run.hands = Watching()
    run.shell = Shell(Controller(POLICY), run.record, run.hands, lambda: 0.0, run.ended.append)
    values = list(vote(1).values)
    values[Slot.STOP] = 1
    run.feed(*BEGINNING)
    assert run.directory.metrics() == []
    run.feed(m.Reported(ONE.worker_id, (m.Report(Vote(1, 1, tuple(values)), 101.0),)))
    assert durable == [(1, [1])]
    run.record.close()


def test_the_trace_replays_to_the_same_commands(tmp_path: Path, begin: Lives) -> None:
    run = begin()
    run.feed(*BEGINNING, reported(1), reported(2), m.Finished(ONE.worker_id, 1, ()))
    head, *lines = map(json.loads, (tmp_path / "logs" / "controller-trace.jsonl").read_text().splitlines())
    controller = Controller(load(head["policy"], Policy), head["epoch"])
    for line in lines:
        output = controller.step(line["now"], load(line["event"], m.Event))
        assert [type(c).__name__ for c in output.commands] == [c.split()[0] for c in line["commands"]]
        assert len(output.journal) == line["entries"]


def test_a_trace_keeps_its_beginning_and_its_end(tmp_path: Path) -> None:
    for life in range(2):
        trace = Trace(tmp_path, part_bytes=100)
        for n in range(50):
            trace.write({"line": 50 * life + n})
        trace.close()
    parts = ("controller-trace.jsonl", "controller-trace-before-last.jsonl", "controller-trace-last.jsonl")
    lines = [[json.loads(text)["line"] for text in (tmp_path / part).read_text().splitlines()] for part in parts]
    assert lines[0] == list(range(len(lines[0])))
    assert lines[1] + lines[2] == list(range(100 - len(lines[1]) - len(lines[2]), 100))
    assert all(100 <= (tmp_path / part).stat().st_size < 120 for part in parts[:2])
    assert len(list(tmp_path.iterdir())) == 3


def test_numbers_of_workers_are_never_used_again(begin: Lives) -> None:
    run = begin()
    other = WorkerInfo(WorkerId("w0007"), NodeId("n"), 12)
    run.feed(m.Started(), m.WorkerReady(other))
    assert begin().past.workers == 7


def test_names() -> None:
    assert worker_id(12) == "w0012"
    assert worker_of("r", worker_name("r", worker_id(3))) == "w0003"
    assert worker_of("r", "r/controller") is None
    assert worker_of("r", "other/w0001") is None
    assert number_of("w10000") == 10000
    assert Past().ended is None
