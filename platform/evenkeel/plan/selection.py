"""Which formations, how many of each, and their shares: the shortest step that so many units allow."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from heapq import heapify, heapreplace
from math import ceil, inf, prod
from operator import mul

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


def deal(pipelines: Sequence[tuple[Formation, int]], micro_batches: int, minimum: int = 0) -> tuple[Group, ...]:
    """The shares that make the slowest finish earliest, as plan/batch.shares does, but by classes of equal pipelines.

    A class splits where its share is not whole; who gets no micro-batch is left out.

    Args:
        minimum: what each pipeline gets at least; together not more than there are.
    """
    counts = [count for _, count in pipelines]
    kinds = [formation for formation, _ in pipelines]
    given = _most_below(kinds, counts, micro_batches, minimum)
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


def _most_below(kinds: Sequence[Formation], counts: Sequence[int], micro_batches: int, minimum: int) -> list[int]:
    """Shares of a step in which not all micro-batches get done, near the one in which they do."""
    low, high = 0.0, min(f.finish_s(micro_batches) for f in kinds)
    shares = [minimum] * len(kinds)
    for _ in range(30):
        middle = (low + high) / 2
        now = [max(minimum, f.share(middle)) for f in kinds]
        if sum(n * k for n, k in zip(counts, now, strict=True)) < micro_batches:
            low, shares = middle, now
        else:
            high = middle
    return shares


def finish_s(groups: Sequence[Group]) -> float:
    """When the last pipeline is done; one pipeline sums with nobody."""
    if sum(count for _, count, _ in groups) == 1:
        formation, _, share = groups[0]
        return _alone_s(formation, share)
    return max(formation.finish_s(share) for formation, _, share in groups)


@dataclass(frozen=True, slots=True)
class Search:
    """What there is to select for.

    Attributes:
        units: there are of each kind.
        prices: of a unit of each kind, in any measure: sets of them that `bound_s` may use.
        at_least: how many pipelines there must be.
        beat_s: only shorter steps are of interest; may be infinite.
    """

    units: Column
    micro_batches: int
    prices: tuple[tuple[float, ...], ...]
    at_least: int
    beat_s: float


def bound_s(kinds: Sequence[Formation], search: Search) -> float:
    """No selection has a shorter step: not the best single pipeline, nor several, by weak duality of linear programs.

    Whatever a unit's price: if no formation does more than g micro-batches per price within a step, then all units
    together do at most g times their price.
    """
    if not kinds:
        return inf
    several = max(_priced_s(kinds, search.units, search.micro_batches, prices) for prices in search.prices)
    return min(several, *(_alone_s(f, search.micro_batches) for f in kinds))


def _priced_s(kinds: Sequence[Formation], units: Column, micro_batches: int, prices: Sequence[float]) -> float:
    each = micro_batches / sum(map(mul, units, prices))
    return min(f.finish_s(ceil(each * sum(map(mul, f.units, prices)) * (1 - 1e-9))) for f in kinds)


def _alone_s(formation: Formation, share: int) -> float:
    return formation.finish_s(share) - formation.after_s + formation.alone_s


def select(kinds: Sequence[Formation], search: Search) -> Selection | None:
    """The selection with the shortest step, if that is below search.beat_s.

    For a given step each formation has a share, and what units can do within it is an integer program over how many
    of each formation there are. The shortest step in which all micro-batches get done is found by bisection.
    """
    best = _alone(kinds, search) if search.at_least <= 1 else None
    # In the longest of these each formation could do everything: more time helps nobody.
    longest_s = max((f.finish_s(search.micro_batches) for f in kinds), default=0.0) * (1 + 1e-6)
    search = replace(search, beat_s=best.step_s if best else min(search.beat_s, longest_s))
    low = bound_s(kinds, search)
    if low >= search.beat_s:
        return best
    states = prod(n + 1 for n in search.units)
    exact = states <= MOST_STATES if sum(search.units) <= EXACT_UNITS else states * search.at_least <= MOST_STATES
    return (_exactly if exact else _nearly)(kinds, search, low) or best


def _alone(kinds: Sequence[Formation], search: Search) -> Selection | None:
    """The best single pipeline, which has no gradients to sum with others."""
    group = min((((f, 1, search.micro_batches),) for f in kinds), key=finish_s, default=None)
    if group is None or finish_s(group) >= search.beat_s:
        return None
    return Selection(group, finish_s(group), finish_s(group))


def _gains(kinds: Sequence[Formation], step_s: float, search: Search) -> list[int]:
    return [min(search.micro_batches, f.share(step_s)) for f in kinds]


def _dealt(kinds: Sequence[Formation], numbers: Sequence[int], search: Search) -> Selection:
    pipelines = [(f, n) for f, n in zip(kinds, numbers, strict=True) if n]
    if search.at_least > 1:
        pipelines = _no_more_than(pipelines, search.micro_batches)
    groups = deal(pipelines, search.micro_batches, 1 if search.at_least > 1 else 0)
    return Selection(groups, finish_s(groups), 0.0)


def _no_more_than(pipelines: Sequence[tuple[Formation, int]], most: int) -> list[tuple[Formation, int]]:
    """As many pipelines as can have a micro-batch each, those that do one fastest."""
    kept = []
    for formation, count in sorted(pipelines, key=lambda pipeline: pipeline[0].finish_s(1)):
        kept.append((formation, min(count, most)))
        most -= kept[-1][1]
    return [(formation, count) for formation, count in kept if count]


def _exactly(kinds: Sequence[Formation], search: Search, low: float) -> Selection | None:
    knapsack = Knapsack([f.units for f in kinds], search.units, search.at_least)

    def within(step_s: float) -> Selection | None:
        most, numbers = knapsack.most(_gains(kinds, step_s, search))
        return _dealt(kinds, numbers, search) if most >= search.micro_batches else None

    best: Selection | None = None
    high, step = search.beat_s, 1e-9
    while best is None and low * (1 + step) < high * (1 - 1e-9):
        best = within(low * (1 + step))
        low, step = (low, step) if best else (low * (1 + step), max(1e-3, 3 * step))
    # Below what was found there is another, or it is the best.
    while (found := within((best.step_s if best else high) * (1 - 1e-9))) is not None:
        best = found
        while best.step_s - low > 1e-3 * best.step_s:
            middle = (low + best.step_s) / 2
            found = within(middle)
            best, low = (found, low) if found else (best, middle)
    return best and replace(best, bound_s=best.step_s)


def _nearly(kinds: Sequence[Formation], search: Search, low: float) -> Selection | None:
    columns = [f.units for f in kinds]

    def within(step_s: float) -> Selection | None:
        most, numbers = whole(columns, _gains(kinds, step_s, search), search.units, search.at_least)
        return _dealt(kinds, numbers, search) if most >= search.micro_batches else None

    bound = low = _relaxed_s(kinds, search, low)
    step, best = 2 * CLOSE, None
    while best is None and low < search.beat_s * (1 - CLOSE):
        step_s = min(bound * (1 + step), search.beat_s * (1 - CLOSE / 2))
        best = within(step_s)
        low, step = (low, step) if best else (step_s, 3 * step)
    while best and best.step_s - low > 10 * CLOSE * low:
        found = within((low + best.step_s) / 2)
        best, low = (found, low) if found else (best, (low + best.step_s) / 2)
    return best and replace(best, bound_s=min(bound, best.step_s))


def _relaxed_s(kinds: Sequence[Formation], search: Search, low: float) -> float:
    """No selection has a shorter step, by linear programs: each one's prices say where the next is worth solving."""
    columns = [f.units for f in kinds]
    high, step = inf, CLOSE / 2
    while low < search.beat_s and high - low > CLOSE * low:
        step_s = low * (1 + step) if high == inf else (low + high) / 2
        most, prices = relaxed(columns, _gains(kinds, step_s, search), search.units, search.at_least)
        if most >= search.micro_batches * (1 - 1e-9):
            high = step_s
            continue
        priced = _priced_s(kinds, search.units, search.micro_batches, prices) if any(y > 0 for y in prices) else low
        low, step = max(step_s, min(priced, high)), (CLOSE / 2 if priced > step_s else 2 * step)
    return low
