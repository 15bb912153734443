"""The benchmark `unequal`: which steps it counts, what it divides by what, and what it makes of runs that fail."""

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "jobs"))

from bench import lab, sides, static, unequal
from bench.process import BenchError
from bench.work import Steps, Work
from evenkeel.core.ids import WorkerId
from evenkeel.core.layout import Layout, Pipeline, Stage

PASS_S = 0.01
"""What a micro-batch takes a fast worker in the runs that are made up here, and in each layer of a pipeline."""
CHANGED_AFTER = 12
"""Steps in which they go on as they began."""


def steps_of(seconds: Sequence[float], run: Path | None = None) -> Steps:
    ends = {0: 100.0}
    for step, taken in enumerate(seconds, 1):
        ends[step] = ends[step - 1] + taken
    del ends[0]
    return Steps(100.0, ends, {step: 5.0 / step for step in ends}, run=run)


def step_s(work: Work, slow: float, shares: Sequence[int], cut: int) -> float:
    """The slowest worker's time. Layers cost alike, and with one stage the model counts as one."""
    if work.pipeline == 2:
        return unequal.MICRO_BATCHES * PASS_S * max(cut, slow * (int(str(work.model["layers"])) + 2 - cut))
    return PASS_S * max(shares[0], slow * shares[1])


def run_directory(folder: Path, work: Work, divisions: Mapping[int, tuple[Sequence[int], int]]) -> Path:
    """Metrics and worlds of a run that begins a generation at each of these steps, with these shares or this cut."""
    run = folder / "run"
    (run / "worlds").mkdir(parents=True)
    lines = []
    for generation, (first, (shares, cut)) in enumerate(divisions.items(), 1):
        lines = lines[: first - 1] + [{"step": s, "generation": generation} for s in range(first, work.steps + 1)]
        if work.pipeline == 2:
            stages = [{"layers": [0, cut]}, {"layers": [cut, 8]}]
            pipelines = [{"micro_batches": [0, unequal.MICRO_BATCHES], "stages": stages}]
        else:
            bounds = ([0, shares[0]], [shares[0], sum(shares)])
            pipelines = [{"micro_batches": bound, "stages": [{"layers": [0, 6]}]} for bound in bounds]
        (run / "worlds" / f"{generation:06d}.json").write_text(json.dumps({"layout": {"pipelines": pipelines}}))
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return run


@pytest.fixture
def fake_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers as fast as they are said to be. The product begins with equal shares and cuts, and takes the best ones
    some steps after it could first see that they are not good."""

    def product(work: Work, name: str = "evenkeel") -> sides.Side:
        def run(folder: Path) -> Steps:
            factor = work.slowdown[1]
            best = {2.0: (20, 10), 4.0: (24, 6), 6.4: (26, 4)}[factor]
            slow_from = work.slow_from or 1
            changed = slow_from + CHANGED_AFTER
            first, then = ((15, 15), 4), (best, 7)
            seconds = [
                step_s(work, factor if s >= slow_from else 1.0, *(then if s >= changed else first))
                for s in range(1, work.steps + 1)
            ]
            return steps_of(seconds, run_directory(folder, work, {1: first, changed: then}))

        return sides.Side(name, 1, run)

    def alone(
        work: Work, name: str, measures: Sequence[str] = (), environment: object = None, layout: Mapping[str, str] = {}
    ) -> sides.Side:
        def run(_: Path) -> Steps:
            shares = [int(n) for n in layout.get("shares", "15,15").split(",")]
            return steps_of([step_s(work, work.slowdown[1], shares, int(layout.get("cuts", "0")))] * work.steps)

        return sides.Side(name, 1, run)

    monkeypatch.setattr(unequal, "product", product)

    def at_once(works: Sequence[Work], folder: Path) -> list[Steps]:
        assert all(work.workers == 1 for work in works)
        paces = [unequal.MICRO_BATCHES * PASS_S * work.slowdown.get(0, 1.0) for work in works]
        return [steps_of([seconds] * work.steps) for seconds, work in zip(paces, works, strict=True)]

    monkeypatch.setattr(unequal, "static", alone)
    monkeypatch.setattr(unequal, "static_at_once", at_once)


@pytest.fixture
def a_lab(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> lab.Lab:
    monkeypatch.setattr(lab, "wait_quiet", lambda _: 0.0)
    return lab.Lab(tmp_path)


@pytest.mark.usefixtures("fake_runs")
def test_the_rows_of_a_product_that_divides_the_work_as_well_as_can_be(a_lab: lab.Lab) -> None:
    result = unequal.unequal(a_lab, None)
    best_6_4 = (1 / 26) / (1 / 30 + 1 / (6.4 * 30))
    assert {row.name: row.value for row in result.rows} == pytest.approx(
        {"shares_2": 1.0, "shares_4": 1.0, "shares_6_4": best_6_4, "cuts": 1.0, "mid_run": 1.0}
    )
    assert [(row.must, row.better, len(row.runs), row.holds) for row in result.rows] == [
        (must, ">=", 15, True) for must in (0.95, 0.95, 0.95, 0.9, 0.93)
    ]
    notes = {name: text.splitlines() for name, text in result.notes.items()}
    assert notes["shares_2"][:2] == ["equal shares: 0.667 of the sum", "shares 20,10: 15 times"]
    assert "step 240 ms, by itself 300 and 1200 ms" in notes["shares_4"]
    assert "5: 3600 ms, 6: 2400 ms, 7: 2100 ms" in notes["cuts"][0]
    assert notes["mid_run"][0] == "planned: 24,6; slow from step 9 on"
    assert notes["mid_run"][1].startswith(f"chosen: 24,6 from step {9 + CHANGED_AFTER} on;")


@pytest.mark.usefixtures("fake_runs")
def test_a_product_that_leaves_the_work_as_it_was_does_not_hold(
    a_lab: lab.Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.modules[__name__], "CHANGED_AFTER", 1000)
    result = unequal.unequal(a_lab, None)
    together = {2.0: 1 / 30, 4.0: 1 / 60, 6.4: 1 / 96}
    shares = {name: together[f] / (1 / 30 + 1 / (30 * f)) for name, f in unequal.SHARES}
    assert {row.name: row.value for row in result.rows} == pytest.approx({**shares, "cuts": 7 / 16, "mid_run": 24 / 60})
    assert not any(row.holds for row in result.rows)


@pytest.mark.usefixtures("fake_runs")
def test_a_run_that_fails_gives_no_value_and_says_why(a_lab: lab.Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(_: Path) -> Steps:
        raise BenchError("exit status 3")

    monkeypatch.setattr(unequal, "product", lambda work, name="evenkeel": sides.Side(name, 1, fails))
    result = unequal.unequal(a_lab, 1)
    assert all((row.value, row.holds, row.runs) == (None, False, ()) for row in result.rows)
    assert all("exit status 3" in result.notes[row.name] for row in result.rows)


def test_a_step_under_way_counts_by_the_part_of_its_time() -> None:
    steps = steps_of([1.0, 1.0, 4.0, 4.0])
    assert unequal.pace(steps, 101.0, 102.0) == pytest.approx(1.0)
    assert unequal.pace(steps, 101.0, 104.0) == pytest.approx(1.5 / 3)
    assert unequal.tail_s(2, steps) == pytest.approx(4.0)


def test_those_that_run_by_themselves_count_only_while_both_are_at_work() -> None:
    fast, slow = steps_of([5.0, 1.0, *[1.0] * 10]), steps_of([2.0] * 7)
    assert unequal._paces(fast, slow) == pytest.approx((1.0, 0.5))
    late = Steps(0.0, {step: end + 50 for step, end in slow.ends.items()}, slow.losses)
    with pytest.raises(BenchError, match="at the same time did not"):
        unequal._paces(fast, late)


def test_how_the_work_was_divided_is_read_from_the_run_directory(tmp_path: Path) -> None:
    work = Work(steps=9, data=2)
    run = run_directory(tmp_path, work, {1: ((15, 15), 0), 5: ((20, 10), 0)})
    assert unequal.arrangements(steps_of([1.0] * 9, run)) == [
        unequal.Arrangement(1, 4, (15, 15), ()),
        unequal.Arrangement(5, 9, (20, 10), ()),
    ]


def test_a_fixed_layout_takes_other_shares_and_cuts() -> None:
    members = [(WorkerId(f"w{i}"),) for i in range(4)]
    stages = [Stage(start, stop, who) for (start, stop), who in zip([(0, 3), (3, 6)] * 2, members, strict=True)]
    begins = Layout((Pipeline(tuple(stages[:2]), 0, 4), Pipeline(tuple(stages[2:]), 4, 8)))
    made = static.arranged(begins, (6, 2), (5,))
    assert [(p.micro_start, p.micro_stop) for p in made.pipelines] == [(0, 6), (6, 8)]
    assert [[(s.start, s.stop) for s in p.stages] for p in made.pipelines] == [[(0, 5), (5, 6)]] * 2
    assert made.members == begins.members
    assert static.arranged(begins, None, None) == begins
    for shares, cuts in (((6, 3), None), ((8,), None), (None, (6,)), (None, (1, 2))):
        with pytest.raises(ValueError):
            static.arranged(begins, shares, cuts)
