"""Which formations, how many of each, and their shares: the shortest step that so many units allow.

A step is as long as the slowest pipeline takes up to the sum of gradients, and then the slowest sum, for which all
wait. How long that is depends on how many pipelines there are and on the others: so it is searched by branch and bound
(A. Land, A. Doig, "An automatic method of solving discrete programming problems", 1960). A branch is the selections of
some numbers of pipelines whose slowest sum is within some times. In it each formation is charged the least that it can
wait for sums. What is best then, by dynamic or integer programming over how many there are of each, no selection of the
branch beats; and if it takes longer in truth, the branch is split, so that the charge comes nearer to the truth. Prices
say which branches cannot be better than what is known.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from heapq import heapify, heappop, heappush, heapreplace
from math import inf, isqrt
from operator import mul
from typing import Self

from evenkeel.plan.formations import EXACT_UNITS
from evenkeel.plan.prices import Bound, Offer, Prices, bound, useful
from evenkeel.plan.scopes import Formation
from evenkeel.plan.solver import Column, Knapsack, whole

EXACT = 1e-8
"""By what part a step must be shorter to be looked for, where the shortest is to be found."""

NEAR = 8e-3
"""The same where one is to be found that is hardly longer."""

MOST_SOLVED = {EXACT: 1000, NEAR: 40}
"""Branches of which the best is looked for, by what is worth it."""

NODES = {EXACT: 10_000, NEAR: 200}
"""Of the tree of each integer program."""

COARSE = 1e-3
"""To within this a branch's best is sought between what is too short and what was found; then from what was found."""

NUMBERS = (1, 2, 3, 4, 6, 8, 12, 16, 32)
"""So many pipelines end a branch at first."""

Group = tuple[Formation, int, int]
"""Equal pipelines: their formation, how many there are, and the share of each."""


@dataclass(frozen=True, slots=True)
class Selection:
    """Attributes:
    step_s: with the sum of gradients.
    """

    groups: tuple[Group, ...]
    step_s: float


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
    low, high = 0.0, max(f.finish_s(min(f.most, micro_batches)) for f in kinds)
    shares = [minimum] * len(kinds)
    for _ in range(30):
        middle = (low + high) / 2
        now = [max(minimum, f.share(middle)) for f in kinds]
        if sum(n * k for n, k in zip(counts, now, strict=True)) < micro_batches:
            low, shares = middle, now
        else:
            high = middle
    return shares


def step_s(groups: Sequence[Group]) -> float:
    """From one sum of gradients to the next: all wait for the slowest pipeline, and for the slowest sum."""
    pipelines = sum(count for _, count, _ in groups)
    return max(f.finish_s(share) for f, _, share in groups) + max(f.sum_s(pipelines) for f, _, _ in groups)


@dataclass(frozen=True, slots=True)
class Search:
    """What there is to select for.

    Attributes:
        units: there are of each kind.
        at_least: how many pipelines there must be.
        beat_s: only shorter steps are of interest; may be infinite.
        worth: by what part a step must be shorter to be looked for, EXACT or NEAR.
    """

    units: Column
    micro_batches: int
    at_least: int
    beat_s: float
    worth: float

    @property
    def most(self) -> int:
        """Pipelines, at most."""
        return min(sum(self.units), self.micro_batches)


@dataclass(frozen=True, slots=True)
class _Branch:
    """Selections of `fewest` to `most` pipelines, whose slowest sum would take `floor_s` to `ceiling_s` over `fewest`.

    Attributes:
        kinds: formations that may be in it.
        offers: the same as they are charged, with the least that they wait for sums.
    """

    search: Search
    fewest: int
    most: int
    floor_s: float
    kinds: tuple[Formation, ...]
    offers: tuple[Offer, ...]

    @classmethod
    def of(
        cls,
        search: Search,
        kinds: Sequence[Formation],
        fewest: int,
        most: int,
        floor_s: float = 0.0,
        ceiling_s: float = inf,
    ) -> Self:
        sums = [(f, f.sum_s(fewest)) for f in kinds]
        usable = [(f, max(sum_s, floor_s)) for f, sum_s in sums if sum_s <= ceiling_s]
        # A hair less than all, so that rounding up does not make one more of them.
        worth = [search.micro_batches * (1 - 1e-9) / n if n else 0.0 for n in (*search.units, most)]
        offers = (
            Offer(f.update_s + f.bubble_s + charge_s, f.pace_s, f.most, tuple(map(mul, (*f.units, 1), worth)))
            for f, charge_s in usable
        )
        return cls(search, fewest, most, floor_s, tuple(f for f, _ in usable), tuple(offers))

    def bound(self, wanted_s: float = inf, start: Prices = ()) -> Bound:
        return bound(self.offers, wanted_s, start) if self.offers else Bound(inf, start)

    def split(self, chosen: Sequence[Group]) -> Iterator["_Branch"]:
        """Branches that together are this one: by the number of pipelines or by the slowest sum, whichever charges what
        was chosen less than it takes by more."""
        pipelines = sum(count for _, count, _ in chosen)
        charges = sorted({max(f.sum_s(self.fewest), self.floor_s) for f, _, _ in chosen})
        more_s = max(f.sum_s(pipelines) for f, _, _ in chosen) - charges[-1]
        if more_s > charges[-1] - charges[0] or len(charges) == 1:
            # Not just below what was chosen, which would hardly change the charge of fewer.
            between = max(self.fewest + 1, isqrt(self.fewest * pipelines))
            yield _Branch.of(self.search, self.kinds, self.fewest, between - 1, self.floor_s)
            yield _Branch.of(self.search, self.kinds, between, self.most, self.floor_s)
            return
        sums = [f.sum_s(self.fewest) for f in self.kinds]
        half_s = (charges[0] + charges[-1]) / 2
        middle_s = max(sum_s for sum_s in (*sums, charges[0]) if sum_s <= half_s)
        above_s = min(sum_s for sum_s in sums if sum_s > middle_s)
        yield _Branch.of(self.search, self.kinds, self.fewest, self.most, self.floor_s, middle_s)
        yield _Branch.of(self.search, self.kinds, self.fewest, self.most, above_s)


@dataclass(frozen=True, slots=True)
class _Found:
    """A selection of a branch, with shares by what its formations are charged, and by what they take.

    Attributes:
        time_s: how long it takes as they are charged.
    """

    selection: Selection
    dealt: Selection
    time_s: float


def bound_s(kinds: Sequence[Formation], search: Search, ends: Sequence[int] = NUMBERS) -> float:
    """No selection has a shorter step; more than search.beat_s is of no interest.

    Args:
        ends: of the numbers of pipelines that are looked at together; fewer of them are quicker and say less.
    """
    least_s = inf
    prices: Prices = ()
    for branch in _branches(kinds, search, ends):
        here = branch.bound(search.beat_s * (1 - search.worth), prices)
        least_s, prices = min(least_s, here.step_s), here.prices
    return least_s


def select(kinds: Sequence[Formation], search: Search) -> tuple[Selection | None, float]:
    """The selection with the shortest step, if that is below search.beat_s; and what no selection beats.

    Found is one that is hardly longer than the shortest if search.worth says so.
    """
    if not kinds or search.most < search.at_least:
        return None, inf
    # If each did all that it has memory for, and waited for the slowest sum: what takes longer fits into no memory.
    sum_s = max(f.sum_s(search.most) for f in kinds)
    longest_s = max(f.finish_s(min(f.most, search.micro_batches)) for f in kinds) + sum_s
    best, beat_s, low_s = None, min(search.beat_s, longest_s * (1 + 1e-6) / (1 - search.worth)), inf
    queue: list[tuple[float, int, _Branch, Prices]] = []
    number, new, parent = 0, list(_branches(kinds, search, NUMBERS)), Bound(0.0, ())
    for _ in range(MOST_SOLVED[search.worth]):
        wanted_s = beat_s * (1 - search.worth)
        for branch in new:
            here = branch.bound(wanted_s, parent.prices)
            heappush(queue, (max(here.step_s, parent.step_s), number, branch, here.prices))
            number += 1
        new = []
        if not queue or queue[0][0] >= wanted_s:
            break
        low, _, branch, prices = heappop(queue)
        found, low = _shortest(branch, wanted_s, low, prices)
        if found is None:
            low_s = min(low_s, low)
            continue
        chosen = found.selection if found.selection.step_s < found.dealt.step_s else found.dealt
        if chosen.step_s < beat_s:
            best, beat_s = chosen, chosen.step_s
        if chosen.step_s <= found.time_s * (1 + search.worth):
            low_s = min(low_s, low)
            continue
        new, parent = list(branch.split(found.selection.groups)), Bound(low, prices)
    low_s = min([low_s, parent.step_s if new else inf, *(low for low, *_ in queue[:1])])
    if best is None and beat_s < search.beat_s and low_s > longest_s:
        return None, search.beat_s
    reached_s = best.step_s if best else search.beat_s
    return best, reached_s if low_s >= reached_s * (1 - 2 * EXACT) else low_s


def _branches(kinds: Sequence[Formation], search: Search, ends: Sequence[int]) -> Iterator[_Branch]:
    """All selections, by numbers of pipelines within which sums take about as long."""
    first = search.at_least
    for last in [n for n in ends if first <= n < search.most] + [search.most]:
        if first <= last and kinds:
            yield _Branch.of(search, kinds, first, last)
        first = last + 1


def _gains(branch: _Branch, within_s: float) -> list[int]:
    """As they are charged."""
    return [min(branch.search.micro_batches, offer.share(within_s)) for offer in branch.offers]


def _found(branch: _Branch, numbers: Mapping[int, int]) -> _Found:
    """So many of those, with shares by what they are charged, so that where all are charged the same it takes that long
    in truth; and by what they take."""
    search, minimum = branch.search, 1 if branch.search.at_least > 1 else 0
    chosen = [(branch.kinds[i], n, branch.offers[i]) for i, n in numbers.items()]
    charged = [(replace(f, update_s=offer.fixed_s - f.bubble_s), n) for f, n, offer in chosen]
    known = {id(as_charged): f for (f, _, _), (as_charged, _) in zip(chosen, charged, strict=True)}
    groups = deal(charged, search.micro_batches, minimum)
    meant = tuple((known[id(f)], n, share) for f, n, share in groups)
    dealt = deal([(f, n) for f, n, _ in chosen], search.micro_batches, minimum)
    time_s = max(f.finish_s(share) for f, _, share in groups)
    return _Found(Selection(meant, step_s(meant)), Selection(dealt, step_s(dealt)), time_s)


# ---------------------------------------------------------------- the best of a branch


def _shortest(branch: _Branch, beat_s: float, low: float, prices: Prices) -> tuple[_Found | None, float]:
    """The fastest as they are charged, or nearly, if one takes less than beat_s; and what none beats."""
    within = _by_programs(branch, prices) if sum(branch.search.units) > EXACT_UNITS else _by_tables(branch)
    best, near, never_s, time_s, step = None, branch.search.worth / 4, low, beat_s, COARSE
    while best is None or low < best.time_s * (1 - near):
        found, never = within(time_s)
        never_s = max(never_s, time_s) if never else never_s
        if found is None and best is None:
            break
        best, low, step = (found, low, step) if found else (best, time_s, 4 * step)
        assert best is not None
        time_s = best.time_s * (1 - near)
        if best.time_s - low > COARSE * best.time_s:
            time_s = min(time_s, (low + best.time_s) / 2, low * (1 + step))
    return best, never_s


Within = Callable[[float], tuple[_Found | None, bool]]
"""One that takes no longer as they are charged, if that is found; and whether there is none."""


def _by_tables(branch: _Branch) -> Within:
    search = branch.search
    knapsack = Knapsack([f.units for f in branch.kinds], search.units, search.at_least, branch.most)

    def within(time_s: float) -> tuple[_Found | None, bool]:
        gained, numbers = knapsack.most(_gains(branch, time_s), search.micro_batches)
        if gained < search.micro_batches:
            return None, True
        return _found(branch, {i: n for i, n in enumerate(numbers) if n}), False

    return within


def _by_programs(branch: _Branch, prices: Prices) -> Within:
    search = branch.search

    def within(time_s: float) -> tuple[_Found | None, bool]:
        gains = _gains(branch, time_s)
        kept = useful(branch.offers, gains, search.micro_batches, prices)
        columns, some = [branch.kinds[i].units for i in kept], [gains[i] for i in kept]
        limits = search.units, search.at_least, branch.most
        counts, never = whole(columns, some, limits, search.micro_batches, NODES[search.worth])
        numbers = {i: n for i, n in zip(kept, counts, strict=True) if n}
        return _found(branch, numbers) if numbers else None, never

    return within
