"""Means over seeds, their intervals, and which of several settings to take."""

from collections.abc import Sequence
from dataclasses import replace
from math import ceil
from random import Random
from statistics import fmean, stdev

import pytest
from scipy.stats import t, ttest_1samp

from evenkeel.core.model import LayerShape, ModelShape, ParamShape
from evenkeel.sim.goodput.setting import CAUSES, Outcome, Setting
from evenkeel.sim.goodput.study import Point, best, cheapest, enough, estimate, gain, study

SETTING = Setting(
    nodes=("a", "b"), devices_per_node=1, model=ModelShape((LayerShape("l", (ParamShape("p", (4,)),)),)),
    data=2, pipeline=1, tensor=1, micro_batches=2, step_s=1.0, tokens_per_step=10.0, duration_s=100.0,
)  # fmt: skip


def outcome(goodput: float, cost: float = 0.0) -> Outcome:
    """Of 100 s, in which a token a second is made where all is productive."""
    seconds = dict.fromkeys(CAUSES, 0.0) | {"productive": 100 * goodput, "redo": 100 * (1 - goodput)}
    return Outcome(100.0, seconds, 0, 100 * goodput, 200.0, cost, 1, {}, 1, 1, ())


def points(axis: str, goodputs: dict[int | None, Sequence[float]], cost: float = 0.0) -> list[Point]:
    return [Point({axis: value}, tuple(outcome(g, cost * (value or 0)) for g in gs)) for value, gs in goodputs.items()]


def test_an_interval_is_that_of_the_t_test() -> None:
    values = [0.91, 0.93, 0.90, 0.95, 0.92]
    found = estimate(values)
    expected = ttest_1samp(values, 0).confidence_interval(0.95)
    assert (found.low, found.high) == (pytest.approx(expected.low), pytest.approx(expected.high))
    assert found.mean == pytest.approx(0.922)


def test_19_of_20_intervals_hold_the_truth() -> None:
    random, held, tries = Random(2), 0, 4000
    for _ in range(tries):
        found = estimate([random.gauss(3.0, 2.0) for _ in range(4)])
        assert found.low is not None
        assert found.high is not None
        held += found.low <= 3.0 <= found.high
    assert held / tries == pytest.approx(0.95, abs=0.012)


def test_one_value_has_no_interval_and_none_has_no_mean() -> None:
    found = estimate([0.5])
    assert (found.mean, found.low, found.high) == (0.5, None, None)
    with pytest.raises(ValueError, match="no value"):
        estimate([])


def test_every_setting_meets_every_seed() -> None:
    def simulate(settings: Sequence[Setting]) -> list[Outcome]:
        return [outcome(0.5 + setting.seed / 100 + setting.spares / 10) for setting in settings]

    settings = [({"spares": n}, replace(SETTING, spares=n)) for n in (0, 2)]
    found = study(settings, (1, 2), simulate)
    assert [p.varied for p in found] == [{"spares": 0}, {"spares": 2}]
    assert [[o.goodput for o in p.outcomes] for p in found] == [
        [0.51, 0.52],
        [pytest.approx(0.71), pytest.approx(0.72)],
    ]
    assert gain(*found).mean == pytest.approx(0.2)


def test_a_gain_is_paired() -> None:
    """Each seed gains the same, though seeds differ far more: the interval is as narrow as the gain is sure."""
    before, after = points("spares", {0: [0.5, 0.7, 0.9], 1: [0.51, 0.71, 0.911]})
    found = gain(before, after)
    assert found.mean == pytest.approx(0.031 / 3)
    half = t.ppf(0.975, 2) * 0.0005773502691896 / 3**0.5
    assert (found.low, found.high) == (pytest.approx(found.mean - half), pytest.approx(found.mean + half))


@pytest.mark.parametrize(
    ("goodputs", "expected"),
    [
        ({0: [0.8], 2: [0.9], 4: [0.9305], 8: [0.931], 16: [0.9311]}, 4),
        ({0: [0.8], 2: [0.8], 4: [0.93]}, 4),  # the first step gains nothing, the second does
        ({8: [0.931], 0: [0.931], 4: [0.93]}, 0),  # in any order
        ({1: [0.8], 2: [0.9], None: [0.95]}, None),  # None is all there are
        ({1: [0.95], 2: [0.95], None: [0.95]}, 1),
    ],
)
def test_enough(goodputs: dict[int | None, Sequence[float]], expected: int | None) -> None:
    found = enough(points("copies", goodputs), "copies")
    assert (found.point.varied["copies"], found.undecided) == (expected, None)


def test_enough_goes_by_the_interval() -> None:
    """By the means 1 is enough; but 2 may gain as much as 0.3 points, which these seeds do not rule out."""
    gains = [0.0, 0.0, 0.0022]
    found = enough(points("spares", {0: [0.5, 0.6, 0.7], 1: [0.9] * 3, 2: [0.9 + g for g in gains]}), "spares")
    assert found.undecided is not None
    assert (found.undecided.varied["spares"], found.point.varied["spares"]) == (1, 2)
    ((more, may),) = found.unsure
    assert more.varied["spares"] == 2
    half = t.ppf(0.975, 2) * stdev(gains) / 3**0.5
    assert found.seeds == ceil(3 * (half / (0.001 - fmean(gains))) ** 2)
    assert (may.low, may.high) == (pytest.approx(fmean(gains) - half), pytest.approx(fmean(gains) + half))


def test_as_many_seeds_as_it_says_tell() -> None:
    """Of drawn gains, and most of the time: how many are needed is itself an estimate."""
    random, told = Random(4), 0
    for _ in range(200):
        gains = [random.gauss(0.0004, 0.001) for _ in range(400)]
        few = enough(points("spares", {0: [0.5] * 4, 1: [0.5 + g for g in gains[:4]]}), "spares")
        if few.undecided is None or not 4 <= few.seeds <= 400:
            continue
        many = gains[: int(few.seeds) * 4]
        found = enough(points("spares", {0: [0.5] * len(many), 1: [0.5 + g for g in many]}), "spares")
        told += 1 if found.undecided is None else -1
    assert told > 20


def test_just_at_what_is_worth_it_no_number_of_seeds_tells() -> None:
    values = [0.5, 0.502]
    found = enough(points("spares", {0: [0.5, 0.5], 1: values}), "spares")
    assert found.undecided is not None
    assert found.seeds > 1e6


def test_the_best_and_the_cheapest() -> None:
    found = points("spares", {1: [0.5, 0.6], 2: [0.9, 0.8], 4: [0.91, 0.81]}, cost=1.0)
    assert best(found).varied["spares"] == 4
    chosen = cheapest(found)
    assert chosen is not None
    assert chosen.varied["spares"] == 1
    assert cheapest(points("spares", {1: [0.5], 2: [0.9]})) is None  # it costs nothing
    assert cheapest(points("spares", {1: [0.0], 2: [0.9]}, cost=1.0)) is None  # a token of the first has no price
    assert found[0].shares == {c: pytest.approx({"productive": 0.55, "redo": 0.45}.get(c, 0.0)) for c in CAUSES}


def test_goodput_is_a_share() -> None:
    (point,) = points("spares", {0: [0.99, 0.7]})
    assert (point.goodput.low, point.goodput.high) == (0.0, 1.0)
