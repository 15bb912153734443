"""What a layout costs: seconds of a layer and of what is sent, bytes of a stage. Each formula with its source.

Roofline: S. Williams et al., "Roofline: an insightful visual performance model", CACM 2009.
Ring: P. Patarasuk, X. Yuan, "Bandwidth optimal all-reduce algorithms for clusters of workstations", JPDC 2009.
Trees: P. Sanders et al., "Two-tree algorithms for full bandwidth broadcast, reduction and scan", Par. Computing 2009.
Hierarchical: M. Cho et al., "BlueConnect", MLSys 2019.
TP: M. Shoeybi et al., "Megatron-LM", 2019; activations in it and recomputation: V. Korthikanti et al., "Reducing
activation recomputation in large transformer models", 2022. Memory of 1F1B: Narayanan et al., 2021.
Copies of the optimizer state: S. Rajbhandari et al., "ZeRO", 2020.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from math import ceil, log2

from evenkeel.plan.hardware import DeviceKind, Link, NodeKind
from evenkeel.plan.memory import WIDTHS
from evenkeel.plan.workload import LayerTime, LayerWork, Profile, Workload


def layer_times(work: Workload, node: NodeKind, tensor: int, profile: Profile | None = None) -> tuple[LayerTime, ...]:
    """Seconds of each layer for one micro-batch on a TP group within a node of this kind.

    What was measured is believed. Where only other TP degrees of the kind of device were, counted times are scaled by
    what measuring found at the nearest of these.

    Raises:
        ValueError: if the device has no peak for the precision, or the profile has another number of layers.
    """
    measured = {
        t: times for (name, t), times in (profile.layers if profile else {}).items() if name == node.device.name
    }
    if any(len(times) != len(work.layers) for times in measured.values()):
        raise ValueError(f"the profile of {node.device.name!r} is not of this model: it has another number of layers")
    if tensor in measured:
        return measured[tensor]
    inside = link_between(node, node, "inside", profile)
    counted = _counted(work, node, tensor, inside)
    if not measured:
        return counted
    near = min(measured, key=lambda t: (abs(log2(t / tensor)), t))
    scales = [
        m.total_s / c.total_s if c.total_s else 1.0
        for m, c in zip(measured[near], _counted(work, node, near, inside), strict=True)
    ]
    return tuple(LayerTime(c.forward_s * k, c.backward_s * k) for c, k in zip(counted, scales, strict=True))


def _counted(work: Workload, node: NodeKind, tensor: int, inside: Link) -> tuple[LayerTime, ...]:
    """Roofline: matrix products at the share of the peak that is reached, but no faster than memory is read.

    Forward: parameters are read and what is kept is written. Backward: parameters and what was kept are read, and
    gradients read and written. Both passes sum over the TP group, and with recomputation the backward pass repeats the
    forward pass.
    """
    device, width = node.device, WIDTHS[work.precision]
    reached = _peak(device, work.precision) * device.reached
    times: list[LayerTime] = []
    for layer in work.layers:
        elements, kept = params_per_rank(layer, tensor), kept_per_rank(layer, tensor)
        sums_s = all_reduce_s(layer.tensor_bytes, tensor, inside)
        read = width.params * elements + kept
        forward_s = max(layer.forward_flops / tensor / reached, read / device.bytes_per_s) + sums_s
        read += 2 * width.grads * elements
        backward_s = max(layer.backward_flops / tensor / reached, read / device.bytes_per_s) + sums_s
        times.append(LayerTime(forward_s, backward_s + (forward_s if work.recompute else 0.0)))
    return tuple(times)


def _peak(device: DeviceKind, precision: str) -> float:
    if precision not in device.flops:
        has = ", ".join(device.flops) or "none"
        raise ValueError(f"device {device.name!r} has no flops for train.precision {precision}; it has: {has}")
    return device.flops[precision]


# ---------------------------------------------------------------- what is sent


def send_s(size: float, link: Link) -> float:
    """Point to point, of so many bytes."""
    return link.latency_s + size / link.bytes_per_s


def all_reduce_s(size: float, members: int, link: Link) -> float:
    """A sum that all get: by a ring or by two trees, whichever is faster (as NCCL chooses), 0 for one member.

    Ring: each sends 2 (n - 1) messages of size / n. Trees: each sends 2 size, in 2 log2 n hops.
    """
    if members < 2:
        return 0.0
    ring = 2 * reduce_scatter_s(size, members, link)
    trees = 2 * size / link.bytes_per_s + 2 * ceil(log2(members)) * link.latency_s
    return min(ring, trees)


def reduce_scatter_s(size: float, members: int, link: Link) -> float:
    """A sum of which each gets 1/members, by a ring; to gather what each has takes as long."""
    return (members - 1) * send_s(size / members, link)


def hierarchical_all_reduce_s(size: float, nodes: int, per_node: int, inside: Link, between: Link) -> float:
    """Scatter the sum within each node, sum each part over the nodes, gather within each node."""
    return 2 * reduce_scatter_s(size, per_node, inside) + all_reduce_s(size / per_node, nodes, between)


def link_between(one: NodeKind, other: NodeKind, where: str, profile: Profile | None = None) -> Link:
    """The link of two devices "inside" a node or "between" nodes: measured, or the slower of their two."""
    first, second = sorted((one.device.name, other.device.name))
    links: Mapping[tuple[str, str, str], Link] = profile.links if profile else {}
    if (first, second, where) in links:
        return links[first, second, where]
    mine, theirs = (one.inside, other.inside) if where == "inside" else (one.between, other.between)
    return Link(min(mine.bytes_per_s, theirs.bytes_per_s), max(mine.latency_s, theirs.latency_s))


# ---------------------------------------------------------------- memory


@dataclass(frozen=True, slots=True)
class StageMemory:
    """Bytes on each device of a stage."""

    params: int
    grads: int
    optimizer: int
    activations: int

    @property
    def total(self) -> int:
        return self.params + self.grads + self.optimizer + self.activations


def params_per_rank(layer: LayerWork, tensor: int) -> int:
    """Elements; what TP does not cut is on every rank."""
    return layer.params - layer.split_params + ceil(layer.split_params / tensor)


def kept_per_rank(layer: LayerWork, tensor: int) -> int:
    """Bytes of one micro-batch kept for the backward pass, without recomputation."""
    return layer.kept_bytes - layer.split_kept_bytes + ceil(layer.split_kept_bytes / tensor)


def held_and_worked(work: Workload, layer: int, tensor: int) -> tuple[int, int]:
    """Bytes that a layer holds per micro-batch in flight, and those that it needs while it is worked on.

    With recomputation only what enters the layer is held, and the rest is there for one layer at a time.
    """
    kept = kept_per_rank(work.layers[layer], tensor)
    if not work.recompute:
        return kept, 0
    return (work.layers[layer - 1].output_bytes if layer else 0), kept


def in_flight(stage: int, stages: int, share: int) -> int:
    """Micro-batches of which stage `stage` keeps activations in 1F1B, at most."""
    return min(stages - stage, share)


def stage_memory(work: Workload, layers: tuple[int, int], tensor: int, flying: int, owned: float) -> StageMemory:
    """Bytes on each device of a stage.

    Args:
        layers: (start, stop).
        flying: micro-batches in flight.
        owned: the part of the optimizer state that each keeps: r / DP.
    """
    width = WIDTHS[work.precision]
    span = range(*layers)
    elements = sum(params_per_rank(work.layers[i], tensor) for i in span)
    bytes_of = [held_and_worked(work, i, tensor) for i in span]
    activations = flying * sum(held for held, _ in bytes_of) + max((worked for _, worked in bytes_of), default=0)
    optimizer = ceil(width.optimizer * elements * owned)
    return StageMemory(width.params * elements, width.grads * elements, optimizer, activations)
