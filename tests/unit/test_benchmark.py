"""The benchmarks' statistics and verdicts, what they do with runs that fail, and the JSON that they end in."""

import json
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median

import pytest

JOBS = Path(__file__).resolve().parents[2] / "jobs"
sys.path.insert(0, str(JOBS))

import benchmark  # noqa: E402
from bench import benchmarks, lab, planning, recovery, sides, stats  # noqa: E402
from bench.process import BenchError, CpuSeries  # noqa: E402
from bench.rows import Bound, Result, row  # noqa: E402
from bench.work import Steps, Work, check_complete, check_same_work  # noqa: E402

FASTER = Bound("vs_peer", "ratio", 1.0, 1.05, ">=", 15, "ours / theirs")
SHORTER = Bound("vs_peer", "ratio", 1.0, 0.7, "<=", 5, "ours / theirs")
SECONDS = Bound("spare", "s", 0.5, 0.15, "<=", 5, "to the next step")

NAMES = {
    "throughput": ["vs_ddp", "vs_raytrain"],
    "tensor": ["vs_dtensor"],
    "pipeline": ["vs_torch"],
    "recovery": ["spare", "shrink", "hang", "mirror"],
    "startup": ["vs_raytrain"],
    "overhead": ["fault_tolerance"],
    "plan": ["equal_4096", "replan_4096", "mixed_16"],
    "checkpoint": ["stall_ratio", "cpu_ratio", "step_while_uploading", "local_write", "s3_write"],
    "memory": ["extra_host_memory", "zero1_step"],
    "unequal": ["shares_2", "shares_4", "shares_6_4", "cuts", "mid_run"],
    "simulate": ["month_16384", "bamboo_p3", "against_real"],
}


def steps_of(step_s: float, count: int = 40, loss: float = 5.0, run: Path | None = None) -> Steps:
    ends = {s: 100.0 + step_s * s for s in range(1, count + 1)}
    return Steps(100.0, ends, {s: loss / s for s in ends}, run=run)


def side(name: str, *results: Steps | str) -> sides.Side:
    """Gives its results one after the other; a string is why there is none."""
    left = iter(results)

    def run(_: Path) -> Steps:
        match next(left):
            case Steps() as steps:
                return steps
            case reason:
                raise BenchError(str(reason))

    return sides.Side(name, 1, run)


@pytest.fixture
def a_lab(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> lab.Lab:
    monkeypatch.setattr(lab, "wait_quiet", lambda _: 0.0)
    return lab.Lab(tmp_path)


# ------------------------------------------------------------ statistics


def test_the_interval_covers_the_true_median_about_as_often_as_it_says() -> None:
    """200 experiments of 15 pairs from a skewed distribution whose median is 1."""
    import numpy as np

    random = np.random.default_rng(7)
    covered = 0
    for _ in range(200):
        interval = stats.bootstrap_median(list(np.exp(random.normal(0.0, 0.3, 15))), resamples=2000)
        covered += interval.low <= 1.0 <= interval.high
    assert 180 <= covered <= 200


def test_the_interval_is_the_same_for_the_same_measurements_and_lies_within_them() -> None:
    values = [1.02, 0.97, 1.05, 1.01, 0.99, 1.03, 0.98]
    interval = stats.bootstrap_median(values)
    assert interval == stats.bootstrap_median(values)
    assert min(values) <= interval.low < median(values) < interval.high <= max(values)


def test_equal_measurements_have_an_interval_of_no_width() -> None:
    assert stats.bootstrap_median([1.25] * 15) == stats.Interval(1.25, 1.25)


def test_no_measurement_has_no_interval() -> None:
    with pytest.raises(ValueError, match="no measurement"):
        stats.bootstrap_median([])


SPREAD = [0.9, 0.94, 0.95, 0.96, 0.97, 0.98, 0.985, 0.99, 1.0, 1.01, 1.02, 1.03, 1.04, 1.06, 1.1]


@pytest.mark.parametrize(
    ("ratios", "holds_faster", "holds_slower"),
    [
        pytest.param(SPREAD, True, True, id="the bound lies within the interval: noise does not decide"),
        pytest.param([r + 0.2 for r in SPREAD], True, False, id="all of the interval is above the bound"),
        pytest.param([r - 0.2 for r in SPREAD], False, True, id="all of the interval is below the bound"),
        pytest.param([0.99] * 15, False, True, id="without noise a miss is a miss"),
        pytest.param([1.0] * 15, True, True, id="exactly the bound"),
    ],
)
def test_a_ratio_of_15_pairs_is_decided_by_its_interval(
    ratios: list[float], holds_faster: bool, holds_slower: bool
) -> None:
    assert stats.ratio_meets(ratios, ">=", 1.0) is holds_faster
    assert stats.ratio_meets(ratios, "<=", 1.0) is holds_slower


def test_a_ratio_of_fewer_pairs_is_decided_by_its_median() -> None:
    assert not stats.ratio_meets([0.9, 0.95, 0.99, 1.2, 1.3], ">=", 1.0)
    assert stats.ratio_meets([0.9, 0.95, 1.0, 1.2, 1.3], ">=", 1.0)


# ------------------------------------------------------------ rows


def test_a_row_without_a_measurement_is_null_and_does_not_hold() -> None:
    made = row(FASTER, [])
    assert (made.value, made.holds, made.runs) == (None, False, ())


def test_nothing_holds_with_fewer_runs_than_asked_for() -> None:
    assert not row(FASTER, [2.0] * 14).holds
    assert row(FASTER, [2.0] * 15).holds
    assert not row(SECONDS, [0.1] * 4).holds
    assert row(SECONDS, [0.1] * 5).holds


def test_a_row_in_seconds_holds_by_its_median() -> None:
    assert row(SECONDS, [0.1, 0.2, 0.5, 3.0, 4.0]).holds
    assert not row(SECONDS, [0.1, 0.2, 0.6, 3.0, 4.0]).holds


def test_the_json_object_has_exactly_the_keys_that_tools_rely_on() -> None:
    result = Result("startup", (row(SHORTER, [0.5, 0.7, 0.6, 0.9, 0.4]), row(SECONDS, [])))
    document = json.loads(json.dumps(result.to_json()))
    assert list(document) == ["benchmark", "rows", "machine", "versions", "date"]
    assert document["rows"] == [
        {
            "name": "vs_peer",
            "value": 0.6,
            "unit": "ratio",
            "must": 1.0,
            "goal": 0.7,
            "better": "<=",
            "holds": True,
            "runs": [0.5, 0.7, 0.6, 0.9, 0.4],
        },
        {
            "name": "spare",
            "value": None,
            "unit": "s",
            "must": 0.5,
            "goal": 0.15,
            "better": "<=",
            "holds": False,
            "runs": [],
        },
    ]
    assert document["machine"]["cores"] >= 1
    assert document["machine"]["cpu"]
    assert document["versions"]["python"] == ".".join(map(str, sys.version_info[:3]))
    assert document["versions"]["evenkeel"]


# ------------------------------------------------------------ runs


def test_step_time_counts_from_the_end_of_the_warm_up_and_takes_stalls_along() -> None:
    ends = {s: 10.0 * s for s in range(1, 11)} | {s: 100.0 + 0.5 * (s - 10) for s in range(11, 30)} | {30: 120.0}
    steps = Steps(5.0, ends, {})
    assert steps.first_step_s == pytest.approx(5.0)
    assert steps.step_s == pytest.approx(1.0)


def test_cpu_time_per_step_is_interpolated_and_none_where_nobody_watched() -> None:
    series = CpuSeries([0.0, 100.0, 200.0], [0.0, 50.0, 50.0], [0.0, 80.0, 100.0])
    steps = Steps(0.0, {s: 10.0 * s for s in range(1, 21)}, {}, series)
    assert steps.cpu_s == pytest.approx(0.0)
    assert steps.foreign_cores == pytest.approx(0.2)
    assert series.own_between(50.0, 150.0) == pytest.approx(25.0)
    assert series.own_between(150.0, 250.0) is None
    assert Steps(0.0, steps.ends, {}).cpu_s is None


def test_other_work_is_told_by_its_losses() -> None:
    ours = steps_of(1.0)
    assert check_same_work(ours, steps_of(2.0, loss=5.0001), "peer") == pytest.approx(2e-5, rel=0.01)
    with pytest.raises(BenchError, match="not the same work: step 1"):
        check_same_work(ours, steps_of(1.0, loss=5.1), "peer")
    with pytest.raises(BenchError, match="not the same work"):
        check_same_work(ours, steps_of(1.0, loss=float("nan")), "peer")
    with pytest.raises(BenchError, match="no step in common"):
        check_same_work(ours, Steps(0.0, {}, {}), "peer")


def test_a_run_that_misses_a_step_or_a_loss_gives_no_measurement() -> None:
    whole = steps_of(1.0, 12)
    check_complete(whole, Work(steps=12), "peer")
    with pytest.raises(BenchError, match="no time of 1 steps"):
        check_complete(whole, Work(steps=13), "peer")
    with pytest.raises(BenchError, match=r"no loss of 1 steps, the first of them \[7\]"):
        check_complete(Steps(0.0, whole.ends, {s: 1.0 for s in whole.ends if s != 7}), Work(steps=12), "peer")


def test_rounds_go_forwards_and_backwards(a_lab: lab.Lab) -> None:
    order: list[str] = []

    def noted(name: str) -> sides.Side:
        def run(_: Path) -> Steps:
            order.append(name)
            return steps_of(1.0)

        return sides.Side(name, 1, run)

    a_lab.rounds((noted("a"), noted("b")), 3)
    assert order == ["a", "b", "b", "a", "a", "b"]


def test_ratios_pair_what_ran_in_the_same_round(a_lab: lab.Lab) -> None:
    ours = side("ours", steps_of(1.0), steps_of(2.0))
    peer = side("peer", steps_of(1.5), steps_of(2.0))
    found = lab.ratios(a_lab.rounds((ours, peer), 2), "peer", "ours", lambda s: s.step_s)
    assert found == pytest.approx([1.5, 1.0])


def test_a_failed_run_is_repeated_once(a_lab: lab.Lab) -> None:
    peer = side("peer", "exit status 1", steps_of(1.0))
    assert len(a_lab.rounds((side("ours", steps_of(1.0)), peer), 1)[0]) == 2
    assert not a_lab.failures


def test_a_side_that_fails_twice_is_given_up_and_its_row_is_null(a_lab: lab.Lab) -> None:
    ours = side("ours", *[steps_of(1.0)] * 3)
    peer = side("peer", steps_of(1.0), "exit status 1", "took more than 240 s")
    rounds = a_lab.rounds((ours, peer), 3)
    assert [len(r) for r in rounds] == [2, 1, 1]
    result = benchmarks._speed("throughput", a_lab, rounds, "ours", {"peer": FASTER})
    assert (result.rows[0].value, result.rows[0].holds, len(result.rows[0].runs)) == (None, False, 1)
    assert "took more than 240 s" in result.notes["vs_peer"]


def test_a_peer_that_does_other_work_is_given_up(a_lab: lab.Lab) -> None:
    rounds = a_lab.rounds((side("ours", steps_of(1.0)), side("peer", steps_of(1.0, loss=6.0))), 1)
    assert list(rounds[0]) == ["ours"]
    assert "not the same work" in a_lab.failures["peer"]


# ------------------------------------------------------------ benchmarks


@pytest.fixture
def fake_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every side trains in no time: a step of ours takes 1 s, of a peer 1.25 s; a fault costs 0.3 s."""

    def ours(work: Work, name: str = "evenkeel") -> sides.Side:
        def run(folder: Path) -> Steps:
            return healing_run(folder, work) if work.faults else steps_of(1.0, work.steps)

        return sides.Side(name, 1, run)

    def peer(name: str) -> Callable[..., sides.Side]:
        return lambda *arguments: sides.Side(name, 1, lambda _: steps_of(1.25, arguments[-1].steps))

    monkeypatch.setattr(benchmarks, "product", ours)
    monkeypatch.setattr(benchmarks, "static", lambda work: ours(work, "engine alone"))
    monkeypatch.setattr(benchmarks, "torchrun", lambda name, script, work: peer(name)(work))
    monkeypatch.setattr(benchmarks, "raytrain", peer("Ray Train"))


def healing_run(folder: Path, work: Work, after: int | None = None, generations: int = 1) -> Steps:
    """A run directory: steps of 1 s, a fault in the middle of its step, 0.3 s and a whole step to the next commit."""
    at = int(str(work.faults[0]["step"]))
    run = folder / "run"
    (run / "faults").mkdir(parents=True)
    marker = run / "faults" / "fault"
    marker.touch()
    os.utime(marker, (100.5 + at - 1, 100.5 + at - 1))
    ends = {s: 100.0 + s + (0.8 if s >= at else 0.0) for s in range(1, work.steps + 1)}
    size = after or work.workers - (work.spares == 0)
    sizes = {s: size if s >= at else work.workers for s in ends}
    lines = [{"step": s, "generation": 1 + generations * (s >= at), "world_size": sizes[s]} for s in ends]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    restored = {"event": "restored", "reason": "step 31 is lost; back to the mirrors of step 30"}
    (run / "events.jsonl").write_text(json.dumps(restored) + "\n" if work.mirror_every else "")
    return Steps(100.0, ends, {s: 5.0 / s for s in ends}, run=run)


EXPECTED: Mapping[str, Mapping[str, float]] = {
    "throughput": {"vs_ddp": 1.25, "vs_raytrain": 1.25},
    "tensor": {"vs_dtensor": 1.25},
    "pipeline": {"vs_torch": 1.25},
    "recovery": {"spare": 0.3, "shrink": 0.3, "hang": 1.3, "mirror": 0.3},
    "startup": {"vs_raytrain": 0.8},
    "overhead": {"fault_tolerance": 1.0},
}


@pytest.mark.usefixtures("fake_runs")
@pytest.mark.parametrize("name", EXPECTED)
def test_each_benchmark_gives_its_rows_and_divides_the_right_way_round(a_lab: lab.Lab, name: str) -> None:
    result = benchmarks.BENCHMARKS[name](a_lab, None)
    assert {r.name: r.value for r in result.rows} == pytest.approx(EXPECTED[name])
    assert [r.name for r in result.rows] == NAMES[name]
    assert all(r.holds is (r.name != "vs_dtensor") for r in result.rows)
    assert all(len(r.runs) == (15 if name in ("throughput", "pipeline", "overhead") else 5) for r in result.rows)
    assert all(result.what[r.name] for r in result.rows)


@pytest.mark.usefixtures("fake_runs")
def test_the_bound_of_a_hang_is_counted_in_steps_of_these_runs(a_lab: lab.Lab) -> None:
    hang = benchmarks.recovery(a_lab, 1).rows[2]
    assert (hang.must, hang.goal) == pytest.approx((6.0, 3.0))


def test_a_run_that_healed_in_another_way_is_no_measurement(tmp_path: Path) -> None:
    spare, shrink, _, mirror = recovery.CASES
    recovery.check_healed(spare, healing_run(tmp_path / "a", spare.work()))
    with pytest.raises(BenchError, match="expected 4, then 4"):
        recovery.check_healed(spare, healing_run(tmp_path / "b", spare.work(), after=3))
    with pytest.raises(BenchError, match="it took 2 generations"):
        recovery.check_healed(shrink, healing_run(tmp_path / "c", shrink.work(), generations=2))
    steps = healing_run(tmp_path / "d", mirror.work())
    assert steps.run is not None
    (steps.run / "events.jsonl").write_text("")
    with pytest.raises(BenchError, match="it went back to mirrors: False"):
        recovery.check_healed(mirror, steps)


def test_a_run_without_its_fault_is_no_measurement(tmp_path: Path) -> None:
    (tmp_path / "faults").mkdir()
    with pytest.raises(BenchError, match="did not happen"):
        recovery.healed(steps_of(1.0, run=tmp_path))


@pytest.fixture
def few_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the clusters of two kinds only the smallest: the largest ones take a minute."""
    monkeypatch.setattr(planning, "MIXED", planning.MIXED[:1])


@pytest.mark.usefixtures("few_devices")
def test_planning_is_measured_for_real(a_lab: lab.Lab) -> None:
    result = benchmarks.plan(a_lab, 1)
    assert [found.name for found in result.rows] == NAMES["plan"]
    assert all(found.value is not None and found.value > 0 for found in result.rows)
    assert "no plan that was looked at is better" in result.notes["mixed_16"]


def test_clusters_of_two_kinds_have_as_many_devices_as_their_names_say() -> None:
    assert [case.name for case in planning.MIXED] == ["mixed_16", "mixed_256", "mixed_4096", "mixed_16384"]
    assert [case.must_s for case in planning.MIXED] == [0.2, 2, 5, 15]
    for case in planning.MIXED:
        assert case.cluster().devices == case.devices
        assert len(case.cluster().nodes) == 2


def test_the_works_configuration_is_one_that_a_run_takes(tmp_path: Path) -> None:
    from evenkeel.config import load_config

    for case in recovery.CASES:
        (tmp_path / case.name).mkdir()
        config = load_config([case.work().write(tmp_path / case.name)])
        assert config.train.micro_batches == 8
        assert [fault.kind for fault in config.faults] == [case.kind]
        assert config.scaling.workers == ([2, 2] if case.name == "mirror" else [3, 4])


# ------------------------------------------------------------ the command


def test_an_unknown_name_ends_with_2_and_one_line_that_lists_the_names(capsys: pytest.CaptureFixture[str]) -> None:
    assert benchmark.main(["nope"]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    (line,) = said.err.splitlines()
    assert all(name in line for name in NAMES)
    assert list(benchmarks.BENCHMARKS) == list(NAMES)


@pytest.mark.usefixtures("few_devices")
def test_with_json_the_last_line_is_the_object(capsys: pytest.CaptureFixture[str]) -> None:
    assert benchmark.main(["plan", "--json", "--pairs", "1"]) == 0
    document = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert document["benchmark"] == "plan"
    assert [r["name"] for r in document["rows"]] == NAMES["plan"]
    assert document["rows"][0]["holds"] is False  # one run is too few


@pytest.mark.usefixtures("few_devices")
def test_without_json_there_is_only_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert benchmark.main(["plan", "--pairs", "1"]) == 0
    out = capsys.readouterr().out
    assert "equal_4096" in out
    assert "{" not in out


@pytest.mark.parametrize("pairs", ["0", "-1", "x"])
def test_a_number_of_pairs_that_is_none_ends_with_2(pairs: str) -> None:
    with pytest.raises(SystemExit) as ended:
        benchmark.main(["plan", "--pairs", pairs])
    assert ended.value.code == 2
