"""Costs for the simulator, read from what a run writes down."""

from dataclasses import asdict
from itertools import accumulate, islice
from pathlib import Path
from typing import Any

import pytest

from evenkeel.control import messages as m
from evenkeel.core.model import LayerShape, ModelShape, ParamShape
from evenkeel.observe.events import MetricsClock, event_record
from evenkeel.sim.goodput import training
from evenkeel.sim.goodput.costs import Costs
from evenkeel.sim.goodput.outages import Drawn, Repair
from evenkeel.sim.goodput.run import Run
from evenkeel.sim.goodput.setting import Setting
from evenkeel.store.errors import StoreError
from evenkeel.store.run_directory import RunDirectory, RunRecord
from evenkeel.tools.measured import measured, measured_in

Record = dict[str, Any]


def steps(
    *seconds: float | None, generation: int = 1, first: int = 1, size: int = 4, begin: float = 4.0
) -> list[Record]:
    """Lines of metrics.jsonl, the first of which ends that long after `begin`."""
    times = accumulate(seconds, lambda at, s: at + (s or 0.0), initial=begin)
    return [
        {"step": first + i, "step_s": s, "generation": generation, "world_size": size, "time": at}
        for i, (s, at) in enumerate(zip(seconds, islice(times, 1, None), strict=True))
    ]


def incident(
    cause: str = "worker lost", generation: int = 2, rolled_forward: bool = False, time: float = 0.0, **phases: float
) -> Record:
    common = {"event": "incident", "generation": generation, "time": time}
    return {**common, "cause": cause, "rolled_forward": rolled_forward, "phases": phases}


METRICS = [
    *steps(None, 0.2, 0.3, 0.2, 0.2, begin=9.0),  # to 9.9
    *steps(1.5, 0.7, 0.2, generation=2, first=6, begin=9.9),  # the first of a world holds the repair; to 12.3
    *steps(9.0, 0.4, 0.4, 0.4, generation=3, first=9, size=3, begin=12.3),  # one worker short
]
EVENTS = [
    {"event": "worker_started", "time": 1.0},
    {"event": "worker_started", "time": 2.0},
    {"event": "world_formed", "time": 3.0},
    {"event": "checkpoint_started", "generation": 1, "checkpoint": 2},
    {"event": "worker_lost", "time": 10.0},
    # Broken at 10.1, 0.2 s after a commit, and so 0.1 s after the middle of a step.
    incident(time=11.02, abort=0.02, settle=0.01, plan=0.04, regroup=0.05, reshard=0.3, first_step=0.5),
    {"event": "checkpoint_committed", "seconds": 2.5},
    {"event": "checkpoint_committed"},  # of an attempt that had been given up
    {"event": "checkpoint_started", "generation": 2, "checkpoint": 6},
    {"event": "worker_started", "time": 16.0},
    incident("pause", abort=100.0),
    {"event": "worker_lost", "time": 20.0},
    {"event": "worker_lost", "time": 21.0},
    {"event": "restored"},
    # Silent since the commit at 12.3, broken at 12.7: 0.3 s after the middle of a step.
    incident(
        generation=3, time=18.8, detect=0.4, abort=0.04, settle=0.03, plan=0.06, regroup=0.07, reshard=5.0,
        first_step=0.9,
    ),
    {"event": "worker_started", "time": 27.0},
]  # fmt: skip


def test_costs_of_a_run() -> None:
    found = measured(METRICS, EVENTS)
    assert (found.by_size, found.repairs) == ({4: pytest.approx(0.2), 3: pytest.approx(0.4)}, 2)
    assert found.step_s == found.by_size[4]
    assert asdict(found.costs) == pytest.approx(
        asdict(
            Costs(
                detect_s=0.2,
                abort_s=0.03,
                settle_s=0.02,
                plan_s=0.05,
                regroup_s=0.06,
                reshard_s=0.3,
                first_step_s=0.4,  # 0.5 less a step of four, and 0.9 less one of three
                start_s=6.5,  # 6 and 7; of the third loss nothing is known
                restore_s=5.0,
                save_stall_s=0.3,  # 0.1 and 0.5
                save_write_s=2.2,  # without the stall
            )
        )
    )


def test_a_configured_fault_tells_when_it_happened() -> None:
    """Of the others the second one only is left, whose process hung half a step after the commit as far as is known."""
    found = measured(METRICS, EVENTS, [3.0, 10.06])
    assert found.costs.detect_s == pytest.approx((0.04 + 0.3) / 2)


@pytest.mark.parametrize(
    "breaks",
    [
        incident(time=11.02, rolled_forward=True, abort=0.92),  # the vote was there: no step is lost
        incident(time=20.0, abort=6.0),  # broken at 14.0, while a world was formed
    ],
)
def test_where_no_step_is_lost_nothing_is_known_of_detection(breaks: Record) -> None:
    formed = {"event": "world_formed", "time": 13.5}
    found = measured(METRICS, [*EVENTS, formed, breaks])
    assert found.costs.detect_s == pytest.approx(0.2)
    assert found.repairs == 3


class Written(Run):
    """A simulated run that also writes down what a real one does."""

    def __init__(self, setting: Setting) -> None:
        self.metrics: list[Record] = []
        self.events: list[Record] = []
        self.line = MetricsClock(8)
        super().__init__(setting)

    def _carry_out(self, command: m.Command) -> None:
        super()._carry_out(command)
        match command:
            case m.Metrics():
                self.metrics.append(self.line.record(command, 0.0, self.now))
            case m.Log():
                self.events.append(event_record(command, self.now))


def test_costs_of_a_simulated_run_are_those_it_was_given(monkeypatch: pytest.MonkeyPatch) -> None:
    """So what is measured of a run and then simulated counts nothing twice: least of all the step that is lost."""
    monkeypatch.setattr(training, "MOST", 0)  # a line for each step, at its time
    costs = Costs(
        detect_s=3.0, abort_s=1.0, settle_s=0.5, plan_s=0.25, regroup_s=4.0, reshard_s=2.0, first_step_s=1.5,
        start_s=40.0, save_stall_s=0.75, save_write_s=5.0,
    )  # fmt: skip
    model = ModelShape(tuple(LayerShape(f"l{i}", (ParamShape(f"w{i}", (64,)),)) for i in range(4)))
    run = Written(
        Setting(
            nodes=tuple(f"n{i}" for i in range(5)), devices_per_node=1, model=model, data=4, pipeline=1, tensor=1,
            micro_batches=12, step_s=8.0, tokens_per_step=8.0, duration_s=60_000.0, costs=costs, spares=1,
            failures=Drawn(80.0, Repair(30.0, fixed=True)), checkpoint_every=5,
        )
    )  # fmt: skip
    run.until(run.setting.duration_s)
    found = measured(run.metrics, run.events)
    assert found.step_s == pytest.approx(8.0)
    assert found.repairs > 150
    given, told = asdict(costs), asdict(found.costs)
    # Two standard deviations of the mean of where in a step a failure comes; and starts wait for their node.
    assert told.pop("detect_s") == pytest.approx(given.pop("detect_s"), abs=0.33)
    assert told.pop("start_s") >= given.pop("start_s")
    assert told == pytest.approx(given, abs=0.05)
    # Known instants leave only deaths during a pause, which are an incident from when the pause began.
    failed = [change.at_s for change in run.setting.failures.changes(run.setting.nodes, 0, run.now) if not change.there]
    assert measured(run.metrics, run.events, failed).costs.detect_s == pytest.approx(3.0, abs=0.2)


def test_a_run_without_faults_has_steps() -> None:
    found = measured(steps(None, 0.2, 0.25, 0.2), [{"event": "world_formed", "time": 3.0}])
    assert (found.step_s, found.repairs, found.costs) == (pytest.approx(0.65 / 3), 0, Costs())


@pytest.mark.parametrize("metrics", [[], steps(None), [*steps(None), *steps(1.0, first=2, generation=2)]])
def test_a_run_without_two_steps_in_a_row(metrics: list[Record]) -> None:
    with pytest.raises(ValueError, match="two steps in a row"):
        measured(metrics, [])


def test_directories_that_do_not_tell(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"no run here \(there is no run\.json\)"):
        measured_in(str(tmp_path / "none"))
    directory = RunDirectory.of(str(tmp_path), "first")
    directory.write_run(RunRecord("first", "running", 1.0, 9.0))
    with pytest.raises(StoreError, match="do not tell what steps and repairs took: ValueError: two steps in a row"):
        measured_in(directory.url)
    for line in ({"step": 1, "world_size": 4, "generation": 1}, {"step": 2, "world_size": 4, "generation": 1}):
        directory.append_metrics(line)
    directory.close()
    with pytest.raises(StoreError, match="KeyError: 'step_s'"):
        measured_in(directory.url)
