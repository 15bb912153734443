"""What to say where a model fits nowhere: by how many bytes, and what would fit."""

from collections.abc import Sequence
from dataclasses import replace
from math import inf

from evenkeel.plan.formations import Costs, can_be_formed
from evenkeel.plan.layout import Infeasible

MOST_NODES = 1 << 16
"""More nodes are not suggested."""


def shortage(every: Sequence[Costs], micro_batches: int, stages: int, copies: int, memory: float) -> Infeasible:
    """How many bytes are missing on each device in the arrangement that comes nearest, and how many nodes would do.

    Args:
        every: the scopes that were tried.
        memory: the part of a device's memory that was planned with.
    """
    missing, near = min(
        ((_missing(costs, micro_batches, stages, copies), costs) for costs in every), key=lambda pair: pair[0]
    )
    kinds = ", ".join(
        f"{n} TP groups on {k.device.name}" for k, n in zip(near.scope.kinds, near.scope.units, strict=True)
    )
    text = (
        f"the model does not fit: with TP {near.scope.tensor} ({kinds}) each device lacks {missing:,} bytes "
        f"({missing / 2**30:.2f} GiB), planning with {memory:.0%} of its memory"
    )
    return Infeasible(f"{text}; {_would_fit(every, micro_batches, stages, copies)}", missing)


def _missing(costs: Costs, micro_batches: int, stages: int, copies: int) -> int:
    """The fewest more bytes on each device with which a pipeline can be formed."""
    low, high = 0, 1 << 20
    while not _fits(costs, high, costs.scope.units, micro_batches, stages, copies):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        if _fits(costs, middle, costs.scope.units, micro_batches, stages, copies):
            high = middle
        else:
            low = middle
    return high


def _fits(costs: Costs, more: int, units: tuple[int, ...], micro_batches: int, stages: int, copies: int) -> bool:
    """Whether a pipeline can be formed with `more` bytes on each device, and as many others as its state is cut for."""
    memory = tuple(room + more for room in costs.scope.memory)
    changed = costs.with_scope(replace(costs.scope, memory=memory, units=units))
    depth = min(stages, costs.layers)
    parts = 1
    while parts == 1 or copies * parts <= min(micro_batches, sum(units)):
        shallowest = can_be_formed(changed, 1 / parts, depth)
        if shallowest and (parts == 1 or shallowest * copies * parts <= sum(units)):
            return True
        parts *= 2
    return False


def _would_fit(every: Sequence[Costs], micro_batches: int, stages: int, copies: int) -> str:
    """The fewest nodes of one kind that would do."""
    found: tuple[float, str] = (inf, "")
    for costs in every:
        for k, kind in enumerate(costs.scope.kinds):
            each = kind.devices // costs.scope.tensor
            nodes = 1
            while each and nodes <= MOST_NODES:
                units = tuple(each * nodes * (i == k) for i in range(len(costs.scope.kinds)))
                if _fits(costs, 0, units, micro_batches, stages, copies):
                    text = f"it would fit on {nodes} nodes of {kind.devices} {kind.device.name}"
                    found = min(found, (nodes * kind.devices, f"{text} with TP {costs.scope.tensor}"))
                    break
                nodes = nodes + 1 if nodes < 64 else 2 * nodes
    return found[1] or (
        "no number of these nodes is enough, as a single layer with its activations is too large for one: use smaller "
        "micro-batches, recomputation or devices with more memory"
    )
