"""Which formations, how many of each, and their shares: the shortest step that so many units allow."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from heapq import heapify, heapreplace

from evenkeel.plan.formations import EXACT_UNITS, Formation
from evenkeel.plan.solver import Column, Knapsack, relaxed, whole

MOST_STATES = 5000
"""Numbers of units left over which dynamic programming is still quick."""

CLOSE = 2e-4
"""How near the step times are between which the best lies, where it is not found exactly."""

Group = tuple[Formation, int, int]
"""Equal pipelines: their formation, how many there are, and the share of each."""


@dataclass(frozen=True, slots=True)
class Selection:
    """Attributes:
    step_s: when the last pipeline is done.
    bound_s: no selection is faster.
    """

    groups: tuple[Group, ...]
    step_s: float
    bound_s: float


def deal(pipelines: Sequence[tuple[Formation, int]], micro_batches: int) -> tuple[Group, ...]:
    """The shares that make the slowest finish earliest, as plan/batch.shares does, but by classes of equal pipelines.

    A class splits where its share is not whole; who gets no micro-batch is left out.
    """
    counts = [count for _, count in pipelines]
    kinds = [formation for formation, _ in pipelines]
    given = _most_below(kinds, counts, micro_batches)
    left = micro_batches - sum(n * k for n, k in zip(counts, given, strict=True))
    heap = [(f.finish_s(given[i] + 1), i) for i, f in enumerate(kinds)]
    heapify(heap)
    more = [0] * len(kinds)
    while left:
        i = heap[0][1]
        more[i] = min(left, counts[i])
        left -= more[i]
        if more[i] == counts[i]:
            given[i], more[i] = given[i] + 1, 0
            heapreplace(heap, (kinds[i].finish_s(given[i] + 1), i))
    groups = []
    for formation, count, share, extra in zip(kinds, counts, given, more, strict=True):
        groups += [(formation, n, k) for n, k in ((extra, share + 1), (count - extra, share)) if n and k]
    return tuple(groups)


def _most_below(kinds: Sequence[Formation], counts: Sequence[int], micro_batches: int) -> list[int]:
    """Shares of a step in which not all micro-batches get done, near the one in which they do."""
    low, high = 0.0, min(f.finish_s(micro_batches) for f in kinds)
    shares = [0] * len(kinds)
    for _ in range(30):
        middle = (low + high) / 2
        now = [f.share(middle) for f in kinds]
        if sum(n * k for n, k in zip(counts, now, strict=True)) < micro_batches:
            low, shares = middle, now
        else:
            high = middle
    return shares


def finish_s(groups: Sequence[Group]) -> float:
    """When the last pipeline is done; one pipeline sums with nobody."""
    if sum(count for _, count, _ in groups) == 1:
        ((formation, _, share),) = groups
        return formation.finish_s(share) - formation.after_s + formation.alone_s
    return max(formation.finish_s(share) for formation, _, share in groups)


def select(
    kinds: Sequence[Formation], units: Column, micro_batches: int, at_least: int, beat_s: float
) -> Selection | None:
    """The selection with the shortest step, if that is below `beat_s`.

    For a given step each formation has a share, and what units can do within it is an integer program over how many
    of each formation there are. The shortest step in which all micro-batches get done is found by bisection.

    Args:
        units: there are of each kind.
        at_least: how many pipelines there must be.
        beat_s: may be infinite.
    """
    best = _alone(kinds, micro_batches, beat_s) if at_least <= 1 else None
    beat_s = best.step_s if best else beat_s
    states = 1
    for n in units:
        states *= n + 1
    found = None
    if kinds and sum(units) <= EXACT_UNITS and states <= MOST_STATES:
        found = _exactly(Knapsack([f.units for f in kinds], units, at_least), kinds, micro_batches, at_least, beat_s)
    elif kinds:
        found = _nearly(kinds, units, micro_batches, at_least, beat_s)
    return found or best


def _alone(kinds: Sequence[Formation], micro_batches: int, beat_s: float) -> Selection | None:
    """The best single pipeline, which has no gradients to sum with others."""
    group = min((((f, 1, micro_batches),) for f in kinds), key=finish_s, default=None)
    if group is None or finish_s(group) >= beat_s:
        return None
    return Selection(group, finish_s(group), finish_s(group))


def _gains(kinds: Sequence[Formation], step_s: float, micro_batches: int) -> list[int]:
    return [min(micro_batches, f.share(step_s)) for f in kinds]


def _dealt(kinds: Sequence[Formation], numbers: Sequence[int], micro_batches: int, at_least: int) -> Selection | None:
    groups = deal([(f, n) for f, n in zip(kinds, numbers, strict=True) if n], micro_batches)
    if sum(count for _, count, _ in groups) < at_least:
        return None
    step_s = max(f.finish_s(share) for f, _, share in groups)
    return Selection(groups, min(step_s, finish_s(groups)), 0.0)


def _exactly(
    knapsack: Knapsack, kinds: Sequence[Formation], micro_batches: int, at_least: int, beat_s: float
) -> Selection | None:
    def within(step_s: float) -> Selection | None:
        most, numbers = knapsack.most(_gains(kinds, step_s, micro_batches))
        return _dealt(kinds, numbers, micro_batches, at_least) if most >= micro_batches else None

    best: Selection | None = None
    low, high = 0.0, min(beat_s, max(f.finish_s(micro_batches) for f in kinds) * (1 + 1e-9))
    # Below what was found there is either another, or it is the best.
    while (found := within(high * (1 - 1e-9))) is not None:
        best, high = found, found.step_s
        while high - low > 1e-3 * high:
            middle = (low + high) / 2
            if (found := within(middle)) is None:
                low = middle
            else:
                best, high = found, found.step_s
    return best and Selection(best.groups, best.step_s, best.step_s)


def _nearly(
    kinds: Sequence[Formation], units: Column, micro_batches: int, at_least: int, beat_s: float
) -> Selection | None:
    columns = [f.units for f in kinds]

    def enough(step_s: float) -> bool:
        gains = _gains(kinds, step_s, micro_batches)
        return relaxed(columns, gains, units, at_least) >= micro_batches * (1 - 1e-9)

    high = min(beat_s, max(f.finish_s(micro_batches) for f in kinds))
    if not enough(high):
        return None
    low = _bisect(enough, 0.0, high)
    for i in range(12):
        step_s = min(low * (1 + CLOSE * 2**i), beat_s)
        most, numbers = whole(columns, _gains(kinds, step_s, micro_batches), units, at_least)
        found = _dealt(kinds, numbers, micro_batches, at_least) if most >= micro_batches else None
        if found is not None and found.step_s < beat_s:
            return Selection(found.groups, found.step_s, min(low, found.step_s))
        if step_s >= beat_s:
            break
    return None


def _bisect(enough: Callable[[float], bool], low: float, high: float) -> float:
    """A time that is not enough, near the least that is."""
    while high - low > CLOSE * high:
        middle = (low + high) / 2
        if enough(middle):
            high = middle
        else:
            low = middle
    return low
