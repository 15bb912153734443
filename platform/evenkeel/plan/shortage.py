"""What to say where a model fits nowhere: by how many bytes, and what would fit."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from evenkeel.plan.formations import can_be_formed
from evenkeel.plan.layout import Infeasible
from evenkeel.plan.scopes import Costs

MOST_NODES = 1 << 16
"""More nodes are not suggested."""

TOO_LARGE = (
    "no number of these nodes is enough, as a layer with its activations is too large for one: use smaller "
    "micro-batches or devices with more memory"
)

CLOSE = 1 << 20
"""How near the missing bytes are found."""


def shortage(every: Sequence[Costs], micro_batches: int, stages: int, copies: int, memory: float) -> Infeasible:
    """How many bytes are missing on each device in the arrangement that comes nearest, and how many nodes would do.

    Args:
        every: the scopes that were tried.
        memory: the part of a device's memory that was planned with.
    """
    most = max(_devices(costs) for costs in every)
    tried = [_Trial(costs, micro_batches, stages, copies) for costs in every if _devices(costs) == most]
    missing, near = min(((trial.missing(), trial) for trial in tried), key=lambda pair: pair[0])
    scope = near.costs.scope
    kinds = " and ".join(f"{n * scope.tensor} {k.device.name}" for k, n in zip(scope.kinds, scope.units, strict=True))
    text = (
        f"the model does not fit on {kinds}: each lacks {missing:,} bytes ({missing / 2**30:.2f} GiB) even with TP "
        f"{scope.tensor}, if {memory:.0%} of the memory is planned with"
    )
    would = min((found for trial in tried for found in trial.would_fit()), default=None)
    return Infeasible(f"{text}; it would fit on {would[1]}" if would else f"{text}; {TOO_LARGE}", missing)


def _devices(costs: Costs) -> int:
    return costs.scope.tensor * sum(costs.scope.units)


@dataclass(frozen=True, slots=True)
class _Trial:
    """One scope, with what a plan must keep to."""

    costs: Costs
    micro_batches: int
    stages: int
    copies: int

    def missing(self) -> int:
        """The fewest more bytes on each device with which a pipeline can be formed, to within CLOSE."""
        low, high = 0, 2**30
        while not self.fits(high, self.costs.scope.units):
            low, high = high, 2 * high
        while high - low > CLOSE:
            middle = (low + high) // 2
            low, high = (low, middle) if self.fits(middle, self.costs.scope.units) else (middle, high)
        return high

    def would_fit(self) -> Iterator[tuple[int, str]]:
        """For each kind of node: how many devices in as many nodes of it as would do, and in words."""
        for k, kind in enumerate(self.costs.scope.kinds):
            each = kind.devices // self.costs.scope.tensor
            units = tuple(each * (i == k) for i in range(len(self.costs.scope.kinds)))
            if each == 0 or not self.fits(0, tuple(MOST_NODES * n for n in units)):
                continue
            low, nodes = 0, 1
            while not self.fits(0, tuple(nodes * n for n in units)):
                low, nodes = nodes, 2 * nodes
            while nodes - low > 1:
                middle = (low + nodes) // 2
                low, nodes = (low, middle) if self.fits(0, tuple(middle * n for n in units)) else (middle, nodes)
            words = f"{nodes} {'node' if nodes == 1 else 'nodes'} of {kind.devices} {kind.device.name}"
            yield nodes * kind.devices, f"{words} with TP {self.costs.scope.tensor}"

    def fits(self, more: int, units: tuple[int, ...]) -> bool:
        """Whether, with `more` bytes on each device, a pipeline can be formed and as many as its state is cut for."""
        memory = tuple(room + more for room in self.costs.scope.memory)
        costs = self.costs.with_scope(replace(self.costs.scope, memory=memory, units=units))
        depth = can_be_formed(costs, 0.0, self.stages)
        most = min(self.micro_batches, sum(units) // depth) // self.copies if depth else 0
        parts = 1 << max(1, most).bit_length()
        while depth and parts > 1:
            parts //= 2
            depth = can_be_formed(costs, 1 / parts, self.stages)
            if depth and (parts == 1 or depth * self.copies * parts <= sum(units)):
                return True
        return False
