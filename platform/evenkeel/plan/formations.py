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
from copy import copy
from dataclasses import dataclass
from itertools import accumulate, pairwise
from math import ceil, floor, inf, log

from evenkeel.plan.cost import (
    all_reduce_s,
    held_and_worked,
    hierarchical_all_reduce_s,
    layer_times,
    params_per_rank,
    send_s,
)
from evenkeel.plan.hardware import Link, NodeKind
from evenkeel.plan.memory import WIDTHS
from evenkeel.plan.workload import LayerTime, Profile, Workload

MOST_PACES = 600
"""More different paces are looked at in steps of PACE_STEP."""

PACE_STEP = 1.002

MOST_MIXED = 200
"""Formations of several kinds are as deep as leaves at most so many of them; of one kind they may be deeper."""

MOST_EXACT = 5000
"""Up to EXACT_UNITS units all formations are looked at, if they are not more than these."""

EXACT_UNITS = 16


@dataclass(frozen=True, slots=True)
class Formation:
    """A pipeline, and what a step costs it.

    Attributes:
        units: how many of each kind of the scope.
        kinds: of each stage, as index into the scope's kinds.
        cuts: layers (start, stop) of each stage.
        pace_s: of the slowest stage per micro-batch.
        bubble_s: what the other stages take for one micro-batch; paid once per step.
        after_s: once per step after the last backward pass: the sum of gradients, and the update.
        alone_s: the same if it is the only pipeline.
    """

    units: tuple[int, ...]
    kinds: tuple[int, ...]
    cuts: tuple[tuple[int, int], ...]
    pace_s: float
    bubble_s: float
    after_s: float
    alone_s: float

    def finish_s(self, share: int) -> float:
        """Seconds of a step with so many micro-batches: plan/pipelines.py, fill_and_pace_s."""
        return self.bubble_s + share * self.pace_s + self.after_s

    def share(self, step_s: float) -> int:
        """How many micro-batches it does within a step, 0 if not one."""
        return max(0, floor((step_s - self.bubble_s - self.after_s) / self.pace_s * (1 + 1e-12)))


@dataclass(frozen=True, slots=True)
class Scope:
    """What a plan may use: units of some kinds of node, at one TP degree, over one class of link.

    Attributes:
        units: TP groups there are of each kind.
        link: between stages and between pipelines: the slowest of those that are used.
        memory: bytes that may be used, of each kind.
        sums_over: how many pipelines gradients are summed over, at most.
    """

    kinds: tuple[NodeKind, ...]
    units: tuple[int, ...]
    tensor: int
    link: Link
    memory: tuple[int, ...]
    sums_over: int


class Costs:
    """Sums over layers, so that a stage's time and memory are differences."""

    def __init__(self, scope: Scope, work: Workload, profile: Profile | None) -> None:
        self.scope = scope
        self.layers = len(work.layers)
        self.recompute = work.recompute
        self.starts: dict[tuple[int, float], list[int]] = {}
        self.times = tuple(layer_times(work, kind, scope.tensor, profile) for kind in scope.kinds)
        self.seconds = tuple((0.0, *accumulate(t.total_s for t in times)) for times in self.times)
        self.send_s = send_s(max((layer.output_bytes for layer in work.layers[:-1]), default=0), scope.link)
        self.elements = (0, *accumulate(params_per_rank(layer, scope.tensor) for layer in work.layers))
        bytes_of = [held_and_worked(work, i, scope.tensor) for i in range(self.layers)]
        self.held = (0, *accumulate(held for held, _ in bytes_of))
        self.worked = tuple(worked for _, worked in bytes_of)
        self.width = WIDTHS[work.precision]

    def with_scope(self, scope: Scope) -> "Costs":
        """The same layers with other units or memory."""
        other = copy(self)
        other.scope = scope
        return other

    def stage_s(self, kind: int, start: int, stop: int) -> float:
        """Both passes of a stage, with what it sends to its neighbours."""
        sends = (start > 0) + (stop < self.layers)
        return self.seconds[kind][stop] - self.seconds[kind][start] + sends * self.send_s

    def passes(self, kind: int, start: int, stop: int) -> LayerTime:
        """Both passes of a stage for themselves."""
        times = self.times[kind][start:stop]
        forward_s = sum(t.forward_s for t in times) + (stop < self.layers) * self.send_s
        return LayerTime(forward_s, sum(t.backward_s for t in times) + (start > 0) * self.send_s)

    def starts_by_time(self, kind: int, pace: float) -> list[int]:
        """The first layer of a stage that stops before layer j, by j, within the pace."""
        if (kind, pace) in self.starts:
            return self.starts[kind, pace]
        seconds, starts = self.seconds[kind], [0]
        for stop in range(1, self.layers + 1):
            room = pace * (1 + 1e-12) - (stop < self.layers) * self.send_s
            whole = seconds[stop] <= room
            starts.append(0 if whole else min(stop, bisect_left(seconds, seconds[stop] - room + self.send_s, 0, stop)))
        self.starts[kind, pace] = starts
        return starts

    def state_width(self, owned: float) -> float:
        """Bytes per parameter."""
        return self.width.params + self.width.grads + self.width.optimizer * owned

    def bytes(self, start: int, stop: int, flying: int, owned: float) -> float:
        """On each device of a stage, as cost.stage_memory counts it."""
        state = (self.elements[stop] - self.elements[start]) * self.state_width(owned)
        return state + flying * (self.held[stop] - self.held[start]) + max(self.worked[start:stop], default=0)

    def after_s(self, kind: int, elements: int, depth: int) -> tuple[float, float]:
        """Once per step, for so many parameters: the sum of gradients with the update, and the update alone.

        The sum is an all-reduce, flat or by nodes, in which stages of a pipeline come before pipelines; where parts of
        the optimizer state are owned it is a reduce-scatter, and parameters, which are not wider than gradients, are
        gathered. The update reads and writes all state once, also where only a part is owned: so that copies are given
        up for memory only.
        """
        node, members = self.scope.kinds[kind], self.scope.sums_over
        update = 2 * elements * self.state_width(1.0) / node.device.bytes_per_s
        near = min(members, max(1, node.devices // self.scope.tensor // depth))
        size, link = self.width.grads * elements, self.scope.link
        by_nodes = hierarchical_all_reduce_s(size, ceil(members / near), near, node.inside, link)
        return min(by_nodes, all_reduce_s(size, members, link)) + update, update

    def formation(self, kinds: Sequence[int], cuts: Sequence[tuple[int, int]]) -> Formation:
        times = [self.stage_s(kind, *cut) for kind, cut in zip(kinds, cuts, strict=True)]
        largest: dict[int, int] = {}
        for kind, (start, stop) in zip(kinds, cuts, strict=True):
            largest[kind] = max(largest.get(kind, 0), self.elements[stop] - self.elements[start])
        after = [self.after_s(kind, elements, len(cuts)) for kind, elements in largest.items()]
        units = tuple(kinds.count(k) for k in range(len(self.scope.kinds)))
        pace = max(times)
        return Formation(
            units,
            tuple(kinds),
            tuple(cuts),
            pace,
            sum(times) - pace,
            max(a for a, _ in after),
            max(a for _, a in after),
        )

    def short_bytes(self, formation: Formation, owned: float) -> float:
        """By how much its fullest device is too small; negative if all fit."""
        depth = len(formation.kinds)
        return max(
            self.bytes(*cut, depth - s, owned) - self.scope.memory[kind]
            for s, (kind, cut) in enumerate(zip(formation.kinds, formation.cuts, strict=True))
        )

    def fluid_s(self, micro_batches: int) -> float:
        """No step is shorter: all units always busy, each with the layers that suit it best.

        With weights 1 / (seconds of all layers) the work of a layer is at least the least weighted time of any kind.
        """
        totals = [seconds[-1] for seconds in self.seconds]
        work = sum(min(ts[i].total_s / c for ts, c in zip(self.times, totals, strict=True)) for i in range(self.layers))
        return micro_batches * work / sum(n / c for n, c in zip(self.scope.units, totals, strict=True))


def formations(costs: Costs, owned: float, stages: int) -> tuple[Formation, ...]:
    """Every formation that fits into the memory and is faster than with fewer units of its own, at its best pace.

    Of few units also those with equally many layers in each stage: they can need less time after the last pass.

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
            found += [costs.formation(kinds, cuts) for kinds, cuts in table.completed()]
        if not table.open:
            break
    if sum(costs.scope.units) <= EXACT_UNITS:
        every = (even(costs, sorted_kinds(count)) for count in counts(costs.scope.units, stages)[1:])
        found += [f for f in every if f is not None and costs.short_bytes(f, owned) <= 0]
    return tuple(found)


def even(costs: Costs, kinds: Sequence[int]) -> Formation | None:
    """Equally many layers in each stage, to within one; None if there are more stages than layers."""
    bounds = [costs.layers * s // len(kinds) for s in range(len(kinds) + 1)]
    return costs.formation(kinds, tuple(pairwise(bounds))) if len(kinds) <= costs.layers else None


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
