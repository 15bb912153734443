"""Several settings under the same seeds: means with confidence intervals, what differs, and which to take."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from math import ceil, inf, sqrt
from statistics import fmean, stdev

from evenkeel.sim.goodput.setting import CAUSES, Outcome, Setting

LEVEL = 0.95
"""Of the confidence intervals."""
WORTH = 0.001
"""A gain in goodput that is smaller than this is none."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean over seeds and its confidence interval; of a single seed there is none (low and high are None)."""

    mean: float
    low: float | None
    high: float | None


@dataclass(frozen=True, slots=True)
class Point:
    """One setting: what was varied to come to it, and what came of it, by seed.

    Attributes:
        varied: by the option's name. What is not varied is the same in all points.
    """

    varied: Mapping[str, int | None]
    outcomes: tuple[Outcome, ...]

    @property
    def goodput(self) -> Estimate:
        """Its interval ends where goodput does, at 0 and 1."""
        found = estimate([outcome.goodput for outcome in self.outcomes])
        if found.low is None or found.high is None:
            return found
        return Estimate(found.mean, max(0.0, found.low), min(1.0, found.high))

    @property
    def shares(self) -> dict[str, float]:
        """The part of the time that goes to each of CAUSES, in their order; mean over the seeds."""
        return {cause: fmean(o.seconds[cause] / o.duration_s for o in self.outcomes) for cause in CAUSES}

    @property
    def cost_per_token(self) -> Estimate | None:
        """None where a seed committed no step."""
        costs = [outcome.cost_per_token for outcome in self.outcomes]
        return estimate([cost for cost in costs if cost is not None]) if None not in costs else None

    def mean(self, value: Callable[[Outcome], float]) -> float:
        """Over the seeds."""
        return fmean(map(value, self.outcomes))


def study(
    settings: Sequence[tuple[Mapping[str, int | None], Setting]],
    seeds: Sequence[int],
    simulate: Callable[[Sequence[Setting]], Iterable[Outcome]],
) -> tuple[Point, ...]:
    """Simulates each setting with each seed. All points meet the same failures by seed.

    Args:
        simulate: all of them, in their order, one after the other or at once.
    """
    outcomes = iter(simulate([replace(setting, seed=seed) for _, setting in settings for seed in seeds]))
    return tuple(Point(varied, tuple(islice(outcomes, len(seeds)))) for varied, _ in settings)


def estimate(values: Sequence[float]) -> Estimate:
    """The mean and its 95 % interval by Student's t (Student, "The probable error of a mean", 1908).

    Raises:
        ValueError: without a value.
    """
    if not values:
        raise ValueError("no value to take the mean of")
    mean = fmean(values)
    if len(values) == 1:
        return Estimate(mean, None, None)
    from scipy.special import stdtrit  # a third of a second, which only this needs

    half = float(stdtrit(len(values) - 1, (1 + LEVEL) / 2)) * stdev(values, mean) / sqrt(len(values))
    return Estimate(mean, mean - half, mean + half)


def gain(before: Point, after: Point) -> Estimate:
    """By how much the goodput is higher in `after`, seed by seed: much narrower than the two intervals suggest.

    Raises:
        ValueError: if they have not as many seeds.
    """
    pairs = zip(before.outcomes, after.outcomes, strict=True)
    return estimate([b.goodput - a.goodput for a, b in pairs])


@dataclass(frozen=True, slots=True)
class Enough:
    """How much of something is enough: the first point after which no more of it gains WORTH.

    Attributes:
        point: that of which this is sure, by the intervals; the one with the most at the latest.
        more: the gains of those with more.
        undecided: the first point with less of which the seeds do not tell whether it is enough; None: none is.
        unsure: the gains of those with more than that one has of which it is not known whether they are worth it.
        seeds: about how many would tell; inf if the means are just at WORTH.
    """

    point: Point
    more: tuple[tuple[Point, Estimate], ...]
    undecided: Point | None = None
    unsure: tuple[tuple[Point, Estimate], ...] = ()
    seeds: float = 0.0


def enough(points: Sequence[Point], axis: str) -> Enough:
    """Of points with more and more of something. With a single seed each mean is taken for sure."""
    ordered = sorted(points, key=lambda point: _value(point, axis))
    undecided: Point | None = None
    open_gains: tuple[tuple[Point, Estimate], ...] = ()
    for i, point in enumerate(ordered):
        gains = tuple((more, gain(point, more)) for more in ordered[i + 1 :])
        lows = [found.mean if found.low is None else found.low for _, found in gains]
        highs = [found.mean if found.high is None else found.high for _, found in gains]
        if all(high < WORTH for high in highs):
            break
        if undecided is None and all(low < WORTH for low in lows):
            undecided = point
            open_gains = tuple(one for one, high in zip(gains, highs, strict=True) if high >= WORTH)
    seeds = max((_seeds_to_tell(found, len(point.outcomes)) for _, found in open_gains), default=0.0)
    return Enough(point, gains, undecided, open_gains, seeds)


def _seeds_to_tell(found: Estimate, seeds: int) -> float:
    """About how many would have an interval of this mean that ends before WORTH: it narrows with their root."""
    apart = abs(found.mean - WORTH)
    if found.high is None or apart == 0:
        return inf
    return ceil(seeds * ((found.high - found.mean) / apart) ** 2)


def best(points: Sequence[Point]) -> Point:
    """The one with the highest goodput; of equal ones the first."""
    return max(points, key=lambda point: point.goodput.mean)


def cheapest(points: Sequence[Point]) -> Point | None:
    """The one whose tokens cost least; None where nothing costs, or some point has no token."""
    costs = [point.cost_per_token for point in points]
    if any(cost is None or cost.mean <= 0 for cost in costs):
        return None
    return min(points, key=lambda point: point.cost_per_token.mean if point.cost_per_token else 0.0)


def _value(point: Point, axis: str) -> float:
    """None is as much as there can be: copies in every pipeline."""
    value = point.varied[axis]
    return inf if value is None else value
