"""The benchmark `simulate`: its settings, its schedules of kills, and what is predicted of a run with them."""

import sys
from collections import Counter
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "jobs"))

from bench import goodput, predicted
from bench.lab import Lab
from bench.predicted import Comparison, Real, Schedule, check_decisions, schedule
from bench.process import BenchError
from evenkeel.config import load_config
from evenkeel.sim.goodput.costs import Costs
from evenkeel.sim.goodput.run import simulate_one
from evenkeel.tools.measured import Measured

COSTS = Costs(detect_s=0.1, abort_s=0.05, regroup_s=0.1, first_step_s=0.2, start_s=6.0, save_stall_s=0.05)
KNOWN = Real(300.0, 40.0, (), 0.1, Measured({3: 0.25, 4: 0.2}, COSTS, 20))


def test_the_month_fills_its_nodes() -> None:
    setting = goodput.month()
    assert len(setting.nodes) * setting.devices_per_node == 16384
    assert setting.workers + setting.spares * setting.devices_per_node == 16384
    assert setting.duration_s == 30 * 24 * 3600


def test_the_trace_is_simulated_to_its_end() -> None:
    outcome = simulate_one(goodput.bamboo())
    assert (outcome.ended, outcome.duration_s) == ("", 40920.0)
    assert sum(outcome.seconds.values()) == pytest.approx(40920.0)
    assert 0.4 < outcome.goodput < 0.8
    assert 50 < outcome.incidents <= 167  # as many nodes are removed, some of them together
    assert "incidents in 11.4 h" in goodput._words(outcome, 1.0)
    with pytest.raises(BenchError, match="ended by itself: failed: why"):
        goodput._words(replace(outcome, ended="failed: why"), 1.0)


@pytest.mark.parametrize("seed", range(1, 9))
def test_kills_come_alone_or_in_pairs(seed: int, tmp_path: Path) -> None:
    found = schedule(seed)
    assert found == schedule(seed) != schedule(seed + 1)
    apart = [b - a for (a, _), (b, _) in pairwise(found.kills)]
    assert len(found.kills) == predicted.KILLS == 20
    assert all(5 <= steps <= 8 or 90 <= steps <= 130 for steps in apart)
    assert not any(a <= 8 and b <= 8 for a, b in pairwise(apart))  # a third one would find the world too small
    assert any(steps <= 8 for steps in apart)
    config = load_config([found.work().write(tmp_path)])
    assert [(fault.step, fault.target) for fault in config.faults] == [(s, f"rank:{r}") for s, r in found.kills]


def test_what_is_predicted_of_a_single_kill() -> None:
    """Counted by hand: the step that is lost, the repair, and nothing else, as the spare has started long before."""
    total_s, decisions = predicted.predicted(Schedule(((100, 1),), 150), KNOWN)
    repair_s = COSTS.detect_s + COSTS.abort_s + COSTS.regroup_s + COSTS.first_step_s
    saves_s = COSTS.save_stall_s  # of step 100
    assert total_s == pytest.approx(149 * 0.2 + 0.1 + repair_s + saves_s, abs=1e-6)
    assert decisions == (
        "world of 2 x 2 stages from step 0: start",
        "step 99 settled, step 100 redone",
        "world of 2 x 2 stages from step 99: worker lost",
    )


def test_what_is_predicted_of_a_pair() -> None:
    """The second kill finds no spare: three go on, more slowly, until a worker has started; the next one is a spare."""
    _, decisions = predicted.predicted(Schedule(((100, 1), (105, 2)), 200), KNOWN)
    worlds = [what for what in decisions if what.startswith("world")]
    assert [what.partition(" from")[0] for what in worlds] == [
        "world of 2 x 2 stages",
        "world of 2 x 2 stages",
        "world of 1 x 2 stages + 1 x 1 stages",
        "world of 2 x 2 stages",
    ]
    assert Counter(what.rpartition(": ")[2] for what in worlds)["worker lost"] == 2


def test_kills_strike_in_their_steps_whatever_came_before() -> None:
    """Four go on faster than three: a step comes sooner than it seemed when the world was small."""
    slow = replace(KNOWN, measured=Measured({3: 1.0, 4: 0.2}, replace(COSTS, start_s=20.0), 20))
    kills = Schedule(((100, 1), (105, 2), (250, 0), (400, 3)), 500)
    run = predicted.Run(predicted._setting(slow))
    for step, rank in kills.kills:
        assert run.until_step(step - 1, 1e9)
        assert run.step == step - 1
        run.lose(rank)
    assert run.until_step(500, 1e9)
    redone = [what for _, what in run.outcome().decisions if what.endswith("redone")]
    assert redone == [f"step {step - 1} settled, step {step} redone" for step, _ in kills.kills]


def test_a_size_that_was_not_measured_has_the_pace_of_its_shares() -> None:
    """Three of which one does a pipeline's work alone have 5 of 8 micro-batches in the longer pipeline."""
    pair = Schedule(((100, 1), (105, 2)), 200)
    known = replace(KNOWN, measured=Measured({4: 0.2}, COSTS, 20))
    unmeasured_s, decisions = predicted.predicted(pair, known)
    assert decisions == predicted.predicted(pair, KNOWN)[1]
    assert unmeasured_s > predicted.predicted(pair, replace(known, measured=Measured({3: 0.2, 4: 0.2}, COSTS, 20)))[0]


def test_steps_are_compared_but_those_of_pauses() -> None:
    assert predicted.comparable(
        [
            "world of 2 x 2 stages from step 0: start",
            "",
            "step 7 settled, step 8 redone",
            "world of 3 x 1 stages from step 7: worker lost",
            "step 11 settled",
            "world of 2 x 2 stages from step 11: pause",
        ]
    ) == (
        "world of 2 x 2 stages from step 0: start",
        "step 7 settled, step 8 redone",
        "world of 3 x 1 stages from step 7: worker lost",
        "step settled",
        "world of 2 x 2 stages from step: pause",
    )


@pytest.mark.parametrize(
    ("beyond_s", "repair_s", "message"),
    [
        (15.0, 0.1, None),
        (
            9.0,
            0.1,
            "9.0 s beyond the steps, predicted 16.4 s, from its own costs 16.4 s: predicted is more than 1.5 times",
        ),
        (15.0, 0.5, "own costs 25.3 s: its own costs' is more than 1.25 times apart"),
    ],
)
def test_repairs_that_take_another_time_are_no_prediction(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, beyond_s: float, repair_s: float, message: str | None
) -> None:
    """Also where the whole time is as predicted, as nearly all of it is steps."""
    decisions = predicted.predicted(schedule(2), KNOWN)[1]
    own = replace(KNOWN.measured, costs=replace(COSTS, regroup_s=repair_s))
    coming = replace(KNOWN, total_s=400.0, beyond_s=beyond_s, decisions=decisions, measured=own)
    runs = iter([KNOWN, coming])
    monkeypatch.setattr(predicted, "real", lambda plan, folder: next(runs))
    if message is None:
        assert predicted.against_real(tmp_path, 0).apart < 1.1
        return
    with pytest.raises(BenchError, match=message):
        predicted.against_real(tmp_path, 0)


def test_other_decisions_are_no_prediction() -> None:
    check_decisions(["a", "b"], ["a", "b"])
    for theirs, message in (
        (["a", "c"], "decision 2 was 'c'; predicted was 'b'"),
        (["a"], "decision 2 was 'nothing'; predicted was 'b'"),
        (["a", "b", "c"], "decision 3 was 'c'; predicted was 'nothing'"),
    ):
        with pytest.raises(BenchError, match=message):
            check_decisions(["a", "b"], theirs)


@pytest.mark.parametrize("fails", [False, True])
def test_rows(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, fails: bool) -> None:
    """With a real run's comparison put in its place, and the trace in that of the month."""

    def compared(folder: Path, number: int) -> Comparison:
        if fails:
            raise BenchError("decision 7 was 'a'; predicted was 'b'")
        return Comparison(1.05, "300.0 s, predicted 315.0 s")

    monkeypatch.setattr("bench.lab.wait_quiet", lambda limit_s: None)
    monkeypatch.setattr(goodput, "against_real", compared)
    monkeypatch.setattr(goodput, "month", goodput.bamboo)
    found = goodput.simulate(Lab(tmp_path), 1)
    month, bamboo, real = found.rows
    assert (month.name, bamboo.name, real.name) == ("month_16384", "bamboo_p3", "against_real")
    assert (month.must, bamboo.must, real.must, real.better) == (60.0, 10.0, 1.1, "<=")
    assert month.value is not None and not month.holds  # one round is too few
    assert "events" in found.notes["bamboo_p3"]
    if fails:
        assert (real.value, real.holds) == (None, False)
        assert "decision 7" in found.notes["against_real"]
    else:
        assert (real.value, real.holds) == (1.05, True)
        assert found.notes["against_real"] == "300.0 s, predicted 315.0 s"
