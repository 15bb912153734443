"""The layers of a pipeline cut again, for workers of unequal speed: which stage is whose stays as it is."""

from bisect import bisect_right
from collections.abc import Callable, Sequence
from itertools import accumulate, pairwise

from evenkeel.plan.cuts import Cuts

_ROUNDING = 1 + 1e-12


def recut(
    costs: Sequence[float],
    paces: Sequence[float],
    now: Cuts,
    fits: Callable[[int, int, int], bool] = lambda stage, start, stop: True,
    worth: float = 1.0,
) -> Cuts | None:
    """Contiguous stages of at least one layer, of which the slowest is as fast as it can be.

    Stage j takes paces[j] * sum(costs[start:stop]) for a micro-batch. That time is bisected; whether there are cuts
    within a time is found stage by stage, from where the ones so far can end. Of the cuts that are as good the one is
    taken that moves few layers: each border in turn stays where it is, or goes as far as it must.

    Args:
        costs: of the layers; not negative.
        paces: time per unit of cost of each stage's workers; positive.
        now: the present cuts, one for each pace.
        fits: whether stage j has the memory for layers start to stop; if it has, then also for fewer of them.
        worth: the present cuts are kept unless others take less than this part of their time.

    Returns:
        None if no cuts fit.
    """
    pipeline = _Pipeline(costs, paces, fits)
    low, high = 0.0, max(paces) * sum(costs) * (1 + 1e-9)
    if all(fits(stage, start, stop) for stage, (start, stop) in enumerate(now)):
        slowest = max(pace * sum(costs[start:stop]) for pace, (start, stop) in zip(paces, now, strict=True))
        if worth < 1 and not pipeline.within(worth * slowest):
            return now
        high = min(high, slowest * (1 + 1e-9))
    elif not pipeline.within(high):
        return None
    while high - low > 1e-12 * high:
        middle = (low + high) / 2
        low, high = (low, middle) if pipeline.within(middle) else (middle, high)
    limit = high * _ROUNDING
    ends = pipeline.ends(limit)
    bounds = [0]
    for stage, (_, wanted) in enumerate(now):
        last = pipeline.reach(stage, bounds[-1], limit)
        bounds.append(min((end for end in ends[stage] if bounds[-1] < end <= last), key=lambda end: abs(end - wanted)))
    return tuple(pairwise(bounds))


class _Pipeline:
    """What stages can take within a time."""

    def __init__(self, costs: Sequence[float], paces: Sequence[float], fits: Callable[[int, int, int], bool]) -> None:
        self._before = (0.0, *accumulate(costs))
        self._paces = paces
        self._fits = fits
        self._too_large = [
            [layer for layer in range(len(costs)) if not fits(stage, layer, layer + 1)] for stage in range(len(paces))
        ]
        self._dearest = sorted(range(len(costs)), key=lambda layer: -costs[layer])
        self._costs = costs

    def within(self, limit: float) -> bool:
        """Whether there are cuts of which no stage takes longer."""
        starts = [(0, 0)]
        for stage in range(len(self._paces)):
            starts = [
                (first + 1, self.reach(stage, last, limit)) for first, last in self._possible(stage, starts, limit)
            ]
        return any(first <= len(self._costs) <= last for first, last in starts)

    def ends(self, limit: float) -> list[list[int]]:
        """By stage, where it may end so that those after it can take the rest; in ascending order."""
        depth = len(self._costs)
        after = [depth]
        found = [after]
        for stage in range(len(self._paces) - 1, 0, -1):
            starts = []
            for start in range(stage, depth):
                following = bisect_right(after, start)
                if following < len(after) and after[following] <= self.reach(stage, start, limit):
                    starts.append(start)
            after = starts
            found.append(after)
        return found[::-1]

    def reach(self, stage: int, start: int, limit: float) -> int:
        """Where the stage ends at the latest if it begins with layer `start`: one layer is left for each one after."""
        most = len(self._costs) - (len(self._paces) - 1 - stage)
        within = bisect_right(self._before, self._before[start] + limit / self._paces[stage]) - 1
        stop = max(start, min(most, within))
        if stop > start and not self._fits(stage, start, stop):
            stop = (
                bisect_right(range(start + 1, stop), False, key=lambda end: not self._fits(stage, start, end)) + start
            )
        return stop

    def _possible(self, stage: int, starts: Sequence[tuple[int, int]], limit: float) -> list[tuple[int, int]]:
        """Of ranges (first, last) of layers those with which the stage can begin: that it can take at all."""
        most = limit / self._paces[stage]
        barred = set(self._too_large[stage])
        for layer in self._dearest:
            if self._before[layer + 1] <= self._before[layer] + most:
                break
            barred.add(layer)
        last = len(self._costs) - (len(self._paces) - stage)
        whole = [(a, min(b, last)) for a, b in starts if a <= min(b, last)]
        if not barred:
            return whole
        found: list[tuple[int, int]] = []
        for a, b in whole:
            for layer in [*sorted(x for x in barred if a <= x <= b), b + 1]:
                if a < layer:
                    found.append((a, layer - 1))
                a = layer + 1
        return found
