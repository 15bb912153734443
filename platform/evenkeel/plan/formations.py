"""Formations: how devices of several kinds make one pipeline, and how fast it is.

A unit is a TP group. What counts is how many units of each kind a pipeline has; its order and cuts are then chosen so
that its slowest stage, its pace, is as fast as it can be within the memory. For a given pace the layers are dealt out
from the last stage to the first, since the p-th stage from the end keeps activations of p micro-batches (1F1B): each
takes as many as pace and memory allow, and of all orders of the same units the one that comes furthest is the best, as
fewer layers are never harder. So one pass over all counts says which of them can have that pace, and going through the
paces upwards gives each its best. Faster than fewer units of it a formation must be, or it is left out.
"""

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from itertools import pairwise
from math import floor, inf, log

from evenkeel.plan.scopes import Costs, Formation
from evenkeel.plan.trade_offs import covers, trade_offs

MOST_PACES = 600
"""More different paces are looked at in steps of PACE_STEP."""

PACE_STEP = 1.002

MOST_MIXED = 200
"""Formations of several kinds are as deep as leaves at most so many of them; of one kind they may be deeper."""

MOST_EXACT = 5000
"""Up to EXACT_UNITS units all formations are looked at, if they are not more than these."""

EXACT_UNITS = 16


def formations(costs: Costs, owned: float, stages: int) -> tuple[Formation, ...]:
    """Every formation that fits into the memory and is faster than with fewer units of its own, at its best pace.

    Of few units also those with equally many layers in each stage: their gradients can be summed sooner.

    Args:
        owned: the part of the optimizer state that each device keeps.
        stages: at most so many.
    """
    table = _Table(costs, owned, min(stages, costs.layers))
    paces = _paces(costs)
    first = bisect_left(paces, True, key=lambda pace: table.deal(pace))
    found: list[Formation] = []
    for pace in paces[first:]:
        if table.deal(pace):
            found += [costs.formation(kinds, cuts, costs.scope.micro_batches) for kinds, cuts in table.completed()]
        if not table.open:
            break
    every = counts(costs.scope.units, stages)
    found = [f for f in found if not covers(costs, f.units)] + list(trade_offs(costs, owned, every))
    if sum(costs.scope.units) <= EXACT_UNITS:
        few = [count for count in every[1:] if sum(count) <= costs.layers and not covers(costs, count)]
        found += [f for count in few if (f := even(costs, sorted_kinds(count), owned)).most]
    return tuple(found)


def even(costs: Costs, kinds: Sequence[int], owned: float) -> Formation:
    """Equally many layers in each stage, to within one; there must be as many layers as stages."""
    bounds = [costs.layers * s // len(kinds) for s in range(len(kinds) + 1)]
    cuts = tuple(pairwise(bounds))
    return costs.formation(kinds, cuts, costs.most(kinds, cuts, owned))


def sorted_kinds(count: Sequence[int]) -> tuple[int, ...]:
    return tuple(k for k, n in enumerate(count) for _ in range(n))


def can_be_formed(costs: Costs, owned: float, stages: int) -> int:
    """The fewest stages with which a pipeline fits into the memory, however slow; 0 if none does."""
    table = _Table(costs, owned, min(stages, costs.layers))
    return min((len(kinds) for kinds, _ in table.completed()), default=0) if table.deal(inf) else 0


def _paces(costs: Costs) -> list[float]:
    """The times that a stage may have, upwards; where there are too many, the longest in each step of PACE_STEP."""
    kinds, layers = range(len(costs.scope.kinds)), range(costs.layers + 1)
    exact = {costs.stage_s(k, i, j) for k in kinds for j in layers for i in range(j)}
    paces = sorted({float(f"{pace:.12g}"): pace for pace in sorted(exact)}.values())
    if len(paces) > MOST_PACES:
        paces = list({floor(log(pace) / log(PACE_STEP)): pace for pace in paces if pace > 0}.values())
    return [pace for pace in paces if pace > 0]


class _Table:
    """How far the layers can be dealt out to each count of units, from the last layer down to the first.

    Attributes:
        open: indices of the counts that are not known to be complete at a pace that was dealt, fewer units first.
    """

    def __init__(self, costs: Costs, owned: float, stages: int) -> None:
        self._costs, self._owned = costs, owned
        self._counts = counts(costs.scope.units, stages)
        index = {count: i for i, count in enumerate(self._counts)}
        self._without = [
            tuple((k, index[*count[:k], n - 1, *count[k + 1 :]]) for k, n in enumerate(count) if n)
            for count in self._counts
        ]
        self._stages = [sum(count) for count in self._counts]
        self._reach = [costs.layers] * len(self._counts)
        self._first = [0] * len(self._counts)
        self._memory: dict[int, list[list[int]]] = {}
        self._done: set[int] = set()
        self.open = list(range(1, len(self._counts)))

    def deal(self, pace: float) -> bool:
        """Deals at this pace to the counts that are open; says whether one gets to the first layer."""
        kinds = range(len(self._costs.scope.kinds))
        by_time = [self._costs.starts_by_time(k, pace) for k in kinds]
        by_memory: list[list[int]] = []
        reach, some, stage = self._reach, False, 0
        nothing = self._costs.layers + 1
        for i in self.open:
            if self._stages[i] != stage:
                stage = self._stages[i]
                by_memory = self._by_memory(stage)
            best, first = nothing, 0
            for k, rest in self._without[i]:
                after = reach[rest]
                if 0 < after < nothing:
                    start = max(by_time[k][after], by_memory[k][after])
                    if start < best and start < after:
                        best, first = start, k
            reach[i], self._first[i] = best, first
            some = some or best == 0
        return some

    def completed(self) -> list[tuple[list[int], list[tuple[int, int]]]]:
        """Kinds and cuts of those that got to the first layer just now; they and what has more units is closed."""
        new = [i for i in self.open if self._reach[i] == 0]
        found = [self._path(i) for i in new]
        self._done.update(new)
        still: list[int] = []
        for i in self.open:
            if i in self._done or any(rest in self._done for _, rest in self._without[i]):
                self._done.add(i)
                self._reach[i] = 0
            else:
                still.append(i)
        self.open = still
        return found

    def _path(self, i: int) -> tuple[list[int], list[tuple[int, int]]]:
        kinds: list[int] = []
        cuts: list[tuple[int, int]] = []
        while i:
            rest = dict(self._without[i])[self._first[i]]
            kinds.append(self._first[i])
            cuts.append((self._reach[i], self._reach[rest]))
            i = rest
        return kinds, cuts

    def _by_memory(self, stage: int) -> list[list[int]]:
        """By kind: the first layer of a stage that stops before layer j, by j, within the memory.

        Args:
            stage: it is the stage-th from the end.
        """
        if stage not in self._memory:
            costs, width = self._costs, self._costs.state_width(self._owned)
            sums = [width * n + stage * held for n, held in zip(costs.elements, costs.held, strict=True)]
            self._memory[stage] = [self._within_room(sums, room) for room in costs.scope.memory]
        return self._memory[stage]

    def _within_room(self, sums: Sequence[float], room: float) -> list[int]:
        worked, start, starts = self._costs.worked, 0, [0]
        for stop in range(1, len(sums)):
            start = min(stop, bisect_left(sums, sums[stop] + worked[stop - 1] - room, start))
            while self._costs.recompute and start < stop and sums[stop] - sums[start] + max(worked[start:stop]) > room:
                start += 1
            starts.append(start)
        return starts


def counts(units: Sequence[int], stages: int) -> list[tuple[int, ...]]:
    """How many units of each kind a pipeline may have, fewer units first; none at all is the first."""
    deepest = min(stages, sum(units))
    everything = sum(units) <= EXACT_UNITS and _size(units, deepest, MOST_EXACT) <= MOST_EXACT
    mixed = deepest
    while not everything and mixed > 1 and _size(units, mixed, MOST_MIXED) > MOST_MIXED:
        mixed -= 1
    kinds = range(len(units))
    pure = [tuple(n * (k == kind) for k in kinds) for kind in kinds for n in range(1, min(units[kind], stages) + 1)]
    return sorted({*_up_to(units, mixed), *pure}, key=lambda a: (sum(a), a))


def _up_to(units: Sequence[int], total: int) -> Iterator[tuple[int, ...]]:
    if not units:
        yield ()
        return
    for first in range(min(units[0], total) + 1):
        for rest in _up_to(units[1:], total - first):
            yield (first, *rest)


def _size(units: Sequence[int], total: int, enough: int) -> int:
    """How many _up_to would give, at least where that is more than enough."""
    ways = [1] + [0] * total
    for most in units:
        ways = [sum(ways[max(0, n - most) : n + 1]) for n in range(total + 1)]
    return sum(ways)
