"""What there is to plan for: kinds of devices, the links between them, and how many nodes of which kind."""

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Link:
    """One way, of each device for itself.

    Attributes:
        bytes_per_s: what a large message reaches.
        latency_s: what a small one takes.
    """

    bytes_per_s: float
    latency_s: float = 0.0


@dataclass(frozen=True, slots=True)
class DeviceKind:
    """What one kind of device can do.

    Attributes:
        name: as devices say it of themselves (WorkerInfo.kind), such as "NVIDIA H100 80GB HBM3".
        memory: bytes.
        flops: peak FLOP/s of dense matrix products, by train.precision.
        bytes_per_s: bandwidth of its memory.
        reached: the share of the peak that training reaches where nothing was measured, 0 to 1.
    """

    name: str
    memory: int
    flops: Mapping[str, float] = field(hash=False)
    bytes_per_s: float
    reached: float = 0.4


@dataclass(frozen=True, slots=True)
class NodeKind:
    """A kind of node: `devices` of one kind, a link among them, and what each of them has to other nodes."""

    device: DeviceKind
    devices: int
    inside: Link
    between: Link


@dataclass(frozen=True, slots=True)
class Cluster:
    """Nodes of several kinds, and how many there are of each. Two kinds of node may have the same kind of device."""

    nodes: tuple[tuple[NodeKind, int], ...]

    @property
    def devices(self) -> int:
        return sum(kind.devices * count for kind, count in self.nodes)
