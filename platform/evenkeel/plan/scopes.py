"""What a plan may use, and what one pipeline costs: its time per micro-batch, its memory, its sums of gradients."""

from bisect import bisect_left
from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass
from itertools import accumulate
from math import ceil, floor, inf

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


@dataclass(frozen=True, slots=True)
class GradientSum:
    """The sum of one stage's gradients over all pipelines.

    Attributes:
        size: bytes on each device.
        near: so many pipelines have that stage in one node.
    """

    size: float
    near: int
    inside: Link
    between: Link

    def seconds(self, pipelines: int) -> float:
        """An all-reduce, flat or by nodes, whichever is faster."""
        near = min(pipelines, self.near)
        flat_s = all_reduce_s(self.size, pipelines, self.between)
        if near == 1:
            return flat_s
        return min(
            flat_s, hierarchical_all_reduce_s(self.size, ceil(pipelines / near), near, self.inside, self.between)
        )


@dataclass(frozen=True, slots=True)
class Formation:
    """A pipeline, and what a step costs it.

    Attributes:
        units: how many of each kind of the scope.
        kinds: of each stage, as index into the scope's kinds.
        cuts: layers (start, stop) of each stage.
        pace_s: of the slowest stage per micro-batch.
        bubble_s: what the other stages take for one micro-batch; paid once per step.
        update_s: of the optimizer, once per step.
        sums: of the gradients, of its largest stage on each kind. All pipelines wait for the slowest.
        most: micro-batches for which there is memory.
    """

    units: tuple[int, ...]
    kinds: tuple[int, ...]
    cuts: tuple[tuple[int, int], ...]
    pace_s: float
    bubble_s: float
    update_s: float
    sums: tuple[GradientSum, ...]
    most: int

    def finish_s(self, share: int) -> float:
        """Seconds from one sum to the next: the update, and so many micro-batches by pipelines.fill_and_pace_s."""
        return self.update_s + self.bubble_s + share * self.pace_s if share <= self.most else inf

    def share(self, within_s: float) -> int:
        """How many micro-batches it does within that time, 0 if not one."""
        possible = floor((within_s - self.update_s - self.bubble_s) / self.pace_s * (1 + 1e-12))
        return max(0, min(self.most, possible))

    def sum_s(self, pipelines: int) -> float:
        """Of its gradients with those of the others."""
        return max((s.seconds(pipelines) for s in self.sums), default=0.0) if pipelines > 1 else 0.0


@dataclass(frozen=True, slots=True)
class Scope:
    """What a plan may use: units of some kinds of node, at one TP degree, over one class of link.

    Attributes:
        units: TP groups there are of each kind.
        inside: the link within each kind of node.
        link: between stages and between pipelines: the slowest of those that are used.
        memory: bytes that may be used, of each kind.
        micro_batches: of a step.
    """

    kinds: tuple[NodeKind, ...]
    units: tuple[int, ...]
    tensor: int
    inside: tuple[Link, ...]
    link: Link
    memory: tuple[int, ...]
    micro_batches: int


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

    def gradient_sum(self, kind: int, elements: int, depth: int) -> GradientSum:
        """Of so many parameters of a stage in pipelines of such a depth: in a node, their stages come before pipelines.

        Where parts of the optimizer state are owned it is a reduce-scatter, and parameters, which are not wider than
        gradients, are gathered: that takes as long.
        """
        near = max(1, self.scope.kinds[kind].devices // self.scope.tensor // depth)
        return GradientSum(self.width.grads * elements, near, self.scope.inside[kind], self.scope.link)

    def update_s(self, kind: int, elements: int) -> float:
        """All state is read and written once, also where only a part is owned: copies are given up for memory only."""
        return 2 * elements * self.state_width(1.0) / self.scope.kinds[kind].device.bytes_per_s

    def formation(self, kinds: Sequence[int], cuts: Sequence[tuple[int, int]], most: int) -> Formation:
        """With these stages, and memory for so many micro-batches."""
        times = [self.stage_s(kind, *cut) for kind, cut in zip(kinds, cuts, strict=True)]
        largest: dict[int, int] = {}
        for kind, (start, stop) in zip(kinds, cuts, strict=True):
            largest[kind] = max(largest.get(kind, 0), self.elements[stop] - self.elements[start])
        pace = max(times)
        return Formation(
            tuple(kinds.count(k) for k in range(len(self.scope.kinds))),
            tuple(kinds),
            tuple(cuts),
            pace,
            sum(times) - pace,
            max(self.update_s(kind, elements) for kind, elements in largest.items()),
            tuple(self.gradient_sum(kind, elements, len(cuts)) for kind, elements in largest.items()),
            most,
        )

    def most(self, kinds: Sequence[int], cuts: Sequence[tuple[int, int]], owned: float) -> int:
        """Micro-batches for which there is memory in all stages; 0 if there is not for one."""
        stages = enumerate(zip(kinds, cuts, strict=True))
        return min(self.most_of_stage(kind, cut, len(cuts) - s, owned) for s, (kind, cut) in stages)

    def most_of_stage(self, kind: int, cut: tuple[int, int], from_end: int, owned: float) -> int:
        """The p-th stage from the end keeps activations of p micro-batches, or of all if there are fewer."""
        room = self.scope.memory[kind] - self.bytes(*cut, 0, owned)
        each = self.held[cut[1]] - self.held[cut[0]]
        most = self.scope.micro_batches
        if room >= min(from_end, most) * each:
            return most
        return max(0, floor(room / each)) if each else 0

    def fluid_s(self, micro_batches: int) -> float:
        """No step is shorter: all units always busy, each with the layers that suit it best.

        With weights 1 / (seconds of all layers) the work of a layer is at least the least weighted time of any kind.
        """
        totals = [seconds[-1] for seconds in self.seconds]
        work = sum(min(ts[i].total_s / c for ts, c in zip(self.times, totals, strict=True)) for i in range(self.layers))
        return micro_batches * work / sum(n / c for n, c in zip(self.scope.units, totals, strict=True))
