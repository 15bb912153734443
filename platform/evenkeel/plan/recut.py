"""The layers of a pipeline cut again, for workers of unequal speed: which stage is whose stays as it is."""

from bisect import bisect_right
from collections.abc import Callable, Sequence
from itertools import accumulate, pairwise

from evenkeel.plan.cuts import Cuts

_HALVINGS = 60
"""Of the interval in which the best time lies: more than a float64 has bits."""


def recut(
    costs: Sequence[float],
    paces: Sequence[float],
    now: Cuts,
    fits: Callable[[int, int, int], bool] = lambda stage, start, stop: True,
) -> Cuts | None:
    """Contiguous stages of at least one layer, of which the slowest is as fast as it can be.

    Stage j takes paces[j] * sum(costs[start:stop]) for a micro-batch. Whether there are cuts within a time is found by
    giving each stage in turn as many layers as it may have, as more never harm those that come after; that time is
    bisected. Of the cuts that are as good the one is taken that moves few layers: each border stays where it is, or
    goes as far as it must.

    Args:
        costs: of the layers; not negative.
        paces: time per unit of cost of each stage's workers; positive.
        now: the present cuts, one for each pace.
        fits: whether stage j has the memory for layers start to stop; if it has, then also for fewer of them.

    Returns:
        None if no cuts fit.
    """
    ahead = _Pipeline(costs, paces, fits)
    most = max(paces) * ahead.before[-1]
    if ahead.furthest(most) is None:
        return None
    low, high = 0.0, most
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        low, high = (low, middle) if ahead.furthest(middle) is not None else (middle, high)
    limit = high * (1 + 1e-12)
    first = _Pipeline(costs[::-1], paces[::-1], _mirrored(fits, len(costs), len(paces))).furthest(limit)
    assert first is not None
    bounds = [0]
    for stage, (_, wanted) in enumerate(now[:-1]):
        least = len(costs) - first[len(paces) - 1 - stage]
        bounds.append(min(max(wanted, least), ahead.reach(stage, bounds[-1], limit)))
    return tuple(pairwise((*bounds, len(costs))))


class _Pipeline:
    """What stages can take, in order."""

    def __init__(self, costs: Sequence[float], paces: Sequence[float], fits: Callable[[int, int, int], bool]) -> None:
        self.before = (0.0, *accumulate(costs))
        self._paces = paces
        self._fits = fits

    def furthest(self, limit: float) -> list[int] | None:
        """Where each stage ends at the latest, with the borders 0 and depth; None if not all layers find a place."""
        bounds = [0]
        for stage in range(len(self._paces)):
            stop = self.reach(stage, bounds[-1], limit)
            if stop <= bounds[-1]:
                return None
            bounds.append(stop)
        return bounds if bounds[-1] == len(self.before) - 1 else None

    def reach(self, stage: int, start: int, limit: float) -> int:
        """Where the stage ends at the latest if it begins with layer `start`: one layer is left for each one after."""
        most = len(self.before) - 1 - (len(self._paces) - 1 - stage)
        stop = min(most, bisect_right(self.before, self.before[start] + limit / self._paces[stage]) - 1)
        if stop > start and not self._fits(stage, start, stop):
            stop = (
                bisect_right(range(start + 1, stop), False, key=lambda end: not self._fits(stage, start, end)) + start
            )
        return stop


def _mirrored(fits: Callable[[int, int, int], bool], depth: int, stages: int) -> Callable[[int, int, int], bool]:
    return lambda stage, start, stop: fits(stages - 1 - stage, depth - stop, depth - start)
