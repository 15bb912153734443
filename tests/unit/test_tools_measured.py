"""Costs for the simulator, read from what a run writes down."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from evenkeel.sim.goodput.costs import Costs
from evenkeel.store.errors import StoreError
from evenkeel.store.run_directory import RunDirectory, RunRecord
from evenkeel.tools.measured import measured, measured_in

Record = dict[str, Any]


def steps(*seconds: float | None, generation: int = 1, first: int = 1, size: int = 4) -> list[Record]:
    """Lines of metrics.jsonl."""
    return [
        {"step": first + i, "step_s": s, "generation": generation, "world_size": size} for i, s in enumerate(seconds)
    ]


def incident(cause: str = "worker lost", **phases: float) -> Record:
    return {"event": "incident", "cause": cause, "phases": phases}


METRICS = [
    *steps(None, 0.2, 0.3, 0.2, 0.2),
    *steps(1.5, 0.7, 0.2, generation=2, first=6),  # the first of a world holds the repair
    *steps(9.0, 0.4, 0.4, 0.4, generation=3, first=9, size=3),  # one worker short
]
EVENTS = [
    {"event": "worker_started", "time": 1.0},
    {"event": "worker_started", "time": 2.0},
    {"event": "world_formed", "time": 3.0},
    {"event": "checkpoint_started", "generation": 1, "checkpoint": 2},
    {"event": "worker_lost", "time": 10.0},
    incident(detect=0.1, abort=0.02, settle=0.01, plan=0.04, regroup=0.05, reshard=0.3, first_step=0.5),
    {"event": "checkpoint_committed", "seconds": 2.5},
    {"event": "checkpoint_committed"},  # of an attempt that had been given up
    {"event": "checkpoint_started", "generation": 2, "checkpoint": 6},
    {"event": "worker_started", "time": 16.0},
    incident("pause", abort=100.0),
    {"event": "worker_lost", "time": 20.0},
    {"event": "worker_lost", "time": 21.0},
    {"event": "restored"},
    incident(detect=0.3, abort=0.04, settle=0.03, plan=0.06, regroup=0.07, reshard=5.0, first_step=0.7),
    {"event": "worker_started", "time": 27.0},
]


def test_costs_of_a_run() -> None:
    found = measured(METRICS, EVENTS)
    assert (found.step_s, found.repairs) == (0.2, 2)
    assert asdict(found.costs) == pytest.approx(
        asdict(
            Costs(
                detect_s=0.2,
                abort_s=0.03,
                settle_s=0.02,
                plan_s=0.05,
                regroup_s=0.06,
                reshard_s=0.3,
                first_step_s=0.4,  # 0.6 less a step
                start_s=6.5,  # 6 and 7; of the third loss nothing is known
                restore_s=5.0,
                save_stall_s=0.3,  # 0.1 and 0.5
                save_write_s=2.5,
            )
        )
    )


def test_a_run_without_faults_has_steps() -> None:
    found = measured(steps(None, 0.2, 0.25, 0.2), [{"event": "world_formed", "time": 3.0}])
    assert (found.step_s, found.repairs, found.costs) == (0.2, 0, Costs())


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
