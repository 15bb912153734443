"""Faults at other moments and in other runs: unequal pipelines, one pipeline, the end of a run, a stop."""

import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from left import alive, nothing_left
from matrix import ONE_PIPELINE, PAIRS, UNEQUAL, Result, cells_of
from matrix_runs import Held, Truth, difference_from, make_job, play, policy, undisturbed
from tiny import Tiny

from evenkeel.control import messages as m
from evenkeel.engine.faults import FaultPlan, once_in
from evenkeel.engine.job import FinalTensors
from evenkeel.engine.local import LocalRun, Outcome

STEPS = 6
Check = Callable[[str, list[Result]], None]


def folder(path: Path) -> Path:
    path.mkdir()
    return path


# ---------------------------------------------------------------- other runs


def test_unequal_pipelines_heal_to_the_last_bit(tmp_path: Path, check: Check) -> None:
    """Three workers of a wish for four: two stages beside one."""
    truth = undisturbed(folder(tmp_path / "truth"), UNEQUAL)
    cells = cells_of(UNEQUAL, "kill", "reduce")[2:]
    check("unequal", play(folder(tmp_path / "run"), UNEQUAL, cells, truth))


@pytest.mark.soak
@pytest.mark.parametrize("kind", ["kill", "exception"])
@pytest.mark.parametrize("phase", ["forward", "reduce", "commit", "recovery"])
def test_unequal_pipelines_in_other_phases(phase: str, kind: str, tmp_path: Path, check: Check) -> None:
    truth = undisturbed(folder(tmp_path / "truth"), UNEQUAL)
    cells = cells_of(UNEQUAL, kind, phase)
    if phase == "forward":
        cells = [c for c in cells if len(c.victims) == 1]  # the second stage waits for the first: never both at once
    check("unequal", play(folder(tmp_path / "run"), UNEQUAL, cells, truth))


@pytest.mark.soak
@pytest.mark.parametrize("phase", ["forward", "backward", "reduce", "before_vote", "after_vote"])
def test_everybody_may_raise_once_where_nobody_may_die(phase: str, tmp_path: Path, check: Check) -> None:
    truth = undisturbed(folder(tmp_path / "truth"), ONE_PIPELINE)
    cells = cells_of(ONE_PIPELINE, "exception", phase)
    check("one pipeline", play(folder(tmp_path / "run"), ONE_PIPELINE, cells, truth))


# ---------------------------------------------------------------- the end of a run


@pytest.fixture(scope="module")
def truth(tmp_path_factory: pytest.TempPathFactory) -> Truth:
    return undisturbed(tmp_path_factory.mktemp("truth"), PAIRS, steps=STEPS)


@dataclass(frozen=True)
class Ending(Held):
    """While the final model is first written: its writer dies or raises, or waits until the test has killed another."""

    how: str = ""

    def write_final(self, final: FinalTensors) -> None:
        if once_in(self.folder)(0):
            if self.how == "raise":
                raise OSError("no space left on device")
            if self.how == "die":
                os.kill(os.getpid(), signal.SIGKILL)
            (self.folder / "writing").touch()
            self._await("killed")
        super().write_final(final)


def killer(job: Ending, rank: int) -> Any:
    """Kills the worker of this rank while rank 0 is writing."""

    def watch(run: LocalRun, event: m.Event) -> None:
        last = isinstance(event, m.Reported) and event.reports[-1].vote.step == job.steps
        if last and not (job.folder / "killed").exists():
            job._await("writing")
            run.fleet.signal(run.member(rank))
            while alive(run.fleet.pid(run.member(rank))):
                time.sleep(0.001)
            (job.folder / "killed").touch()

    return watch


@pytest.mark.parametrize(
    ("how", "rank", "spares"),
    [
        ("die", 0, 1),
        ("wait", 1, 1),
        pytest.param("wait", 3, 0, marks=pytest.mark.soak),
        pytest.param("raise", 0, 0, marks=pytest.mark.soak),
        pytest.param("die", 0, 0, marks=pytest.mark.soak),
    ],
)
def test_the_final_model_is_written_though_it_was_disturbed(
    how: str, rank: int, spares: int, tmp_path: Path, truth: Truth
) -> None:
    """By the writer's own death, by one whose parameters it gathers, by one that only waits, by an error."""
    plain = make_job(tmp_path, PAIRS, (), steps=STEPS)
    job = Ending(plain.folder, plain.precision, plain.steps, tied=plain.tied, how=how)
    with nothing_left():
        run = LocalRun(
            job, policy(job, PAIRS, spares), watch=killer(job, rank) if how == "wait" else None,
            not_before={4 + spares: 10**9},
        )  # fmt: skip
        outcome = run.run()
    assert (outcome.status, outcome.error) == ("finished", "")
    assert [line.vote.step for line in outcome.metrics] == list(range(1, STEPS + 1))
    assert difference_from(truth, job, outcome) == ""
    assert not any(alive(info.pid) for info in outcome.ready.values())


# ---------------------------------------------------------------- a stop


@pytest.mark.parametrize(
    "moment", [m.Settled, *(pytest.param(x, marks=pytest.mark.soak) for x in (m.WorkerLost, m.Answered, m.Joined))]
)
def test_a_stop_in_a_recovery_ends_the_run_between_two_steps(moment: type[m.Event], tmp_path: Path) -> None:
    asked: list[m.Event] = []

    def watch(run: LocalRun, event: m.Event) -> None:
        if isinstance(event, moment) and len(run.outcome.metrics) >= 2 and not asked:
            asked.append(event)
            run.stop("enough")

    job = replace(
        make_job(tmp_path, PAIRS, (), steps=10**6), faults=(FaultPlan(0, 4, "backward", "rank:1", "kill"),)
    )  # fmt: skip
    with nothing_left():
        outcome = LocalRun(job, policy(job, PAIRS, 1), watch=watch).run()
    check_stopped(job, outcome)


def check_stopped(job: Tiny, outcome: Outcome) -> None:
    assert (outcome.status, outcome.error) == ("stopped", "enough")
    steps = [line.vote.step for line in outcome.metrics]
    assert steps == list(range(1, len(steps) + 1))
    assert 3 <= len(steps) < job.steps
    assert not any(alive(info.pid) for info in outcome.ready.values())
