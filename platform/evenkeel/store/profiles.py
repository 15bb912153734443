"""profile.json of a run directory: what its model's layers take on each kind of device, and what the links take."""

from dataclasses import dataclass, field
from itertools import chain
from math import isfinite
from typing import Any

from evenkeel.core.codec import CodecError, dump, load
from evenkeel.plan.hardware import Link
from evenkeel.plan.workload import LayerTime, Profile
from evenkeel.store.errors import StoreError
from evenkeel.store.journal import check_format
from evenkeel.store.untrusted import LATEST, is_number, short

FORMAT = 1
INSIDE, BETWEEN = "inside", "between"
LONGEST_S = 1e6
"""For one layer's pass, or one message; no device that trains anything takes longer."""
SLOWEST, FASTEST = 1.0, 1e15
"""Bytes a second."""
SHORTEST_S = 1e-9
"""For all of a model's layers together."""


@dataclass(frozen=True, slots=True)
class Key:
    """What a profile is of. One with another key says nothing about a run.

    Attributes:
        model: model.name.
        layers: their names.
        fingerprint: of all that decides what a layer computes: model, shapes, data's options, and what is beside here.
    """

    model: str
    precision: str
    micro_batch: int
    layers: tuple[str, ...]
    fingerprint: str

    def difference(self, other: "Key") -> str:
        """What makes the other one another, in words; "" if it is the same."""
        for name, what in (("model", "model"), ("precision", "precision"), ("micro_batch", "micro-batch")):
            ours, theirs = getattr(self, name), getattr(other, name)
            if ours != theirs:
                return f"it is of {what} {short(theirs, 80)}, not {short(ours, 80)}"
        if self.layers != other.layers:
            return f"it is of another model, of {len(other.layers)} layers, not {len(self.layers)}"
        return "" if self == other else "the model, or what it is given, has changed since"


@dataclass(frozen=True, slots=True)
class DeviceRecord:
    """A kind of device that was measured. `memory` is in bytes, 0 if not known."""

    kind: str
    memory: int

    def __post_init__(self) -> None:
        _require(0 < len(self.kind) <= 200, "a kind of device has a name of 1 to 200 characters")
        _require(is_number(self.memory), f"memory {short(self.memory, 40)} is no number of bytes")


@dataclass(frozen=True, slots=True)
class TimesRecord:
    """Seconds of each layer, forward and backward, on one kind of device and at one TP degree."""

    kind: str
    tensor: int
    forward_s: tuple[float, ...]
    backward_s: tuple[float, ...]

    def __post_init__(self) -> None:
        _require(1 <= self.tensor <= 2**16, f"TP degree {short(self.tensor, 40)} is not one of 1 to 65,536")
        for seconds in (*self.forward_s, *self.backward_s):
            _require(isfinite(seconds) and 0 <= seconds <= LONGEST_S, f"a layer takes no {short(seconds, 40)} s")
        whole_s = sum((*self.forward_s, *self.backward_s))
        _require(whole_s >= SHORTEST_S, f"the model on {short(self.kind, 80)} at TP {self.tensor} takes no time")


@dataclass(frozen=True, slots=True)
class LinkRecord:
    """The link between a device of one kind and one of another, `where` is inside a node or between nodes."""

    kinds: tuple[str, str]
    where: str
    bytes_per_s: float
    latency_s: float

    def __post_init__(self) -> None:
        _require(list(self.kinds) == sorted(self.kinds), "the kinds of a link's devices are in alphabetical order")
        _require(self.where in (INSIDE, BETWEEN), f"{short(self.where, 40)!r} is neither {INSIDE} nor {BETWEEN}")
        rate, latency = self.bytes_per_s, self.latency_s
        _require(isfinite(rate) and SLOWEST <= rate <= FASTEST, f"no link has {short(rate, 40)} bytes/s")
        _require(isfinite(latency) and 0 <= latency <= LONGEST_S, f"no link has a latency of {short(latency, 40)} s")


@dataclass(frozen=True, slots=True)
class ProfileRecord:
    """profile.json.

    Attributes:
        kept_bytes: what each layer keeps of one micro-batch for the backward pass.
        output_bytes: what each layer hands on of one micro-batch; the last one nothing.
        time: unix seconds when it was measured.
        seconds: that it took.
        versions: of what it was measured with, by name.
    """

    key: Key
    devices: tuple[DeviceRecord, ...]
    times: tuple[TimesRecord, ...]
    links: tuple[LinkRecord, ...]
    kept_bytes: tuple[int, ...]
    output_bytes: tuple[int, ...]
    time: float
    seconds: float
    versions: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        depth = len(self.key.layers)
        lists = chain.from_iterable((t.forward_s, t.backward_s) for t in self.times)
        for values in (self.kept_bytes, self.output_bytes, *lists):
            _require(len(values) == depth, f"{len(values)} values for {depth} layers")
        _require(all(is_number(n) for n in (*self.kept_bytes, *self.output_bytes)), "sizes are numbers of bytes")
        kinds = [device.kind for device in self.devices]
        _require(len(set(kinds)) == len(kinds), "a kind of device is there twice")
        told = [*(t.kind for t in self.times), *chain.from_iterable(link.kinds for link in self.links)]
        _require(set(told) <= set(kinds), "a kind of device is not among the devices")
        for found in ([(t.kind, t.tensor) for t in self.times], [(link.kinds, link.where) for link in self.links]):
            _require(len(set(found)) == len(found), "times or a link are there twice")
        _require(isfinite(self.time) and 0 <= self.time <= LATEST, "its time is none")
        _require(isfinite(self.seconds) and 0 <= self.seconds <= LONGEST_S, "it took no such time")

    @property
    def profile(self) -> Profile:
        """For the planner."""
        layers = {
            (t.kind, t.tensor): tuple(LayerTime(f, b) for f, b in zip(t.forward_s, t.backward_s, strict=True))
            for t in self.times
        }
        links = {(*link.kinds, link.where): Link(link.bytes_per_s, link.latency_s) for link in self.links}
        return Profile(layers, links, self.kept_bytes)

    def degrees(self) -> frozenset[int]:
        """The TP degrees that were measured on every kind of device."""
        found = [{t.tensor for t in self.times if t.kind == device.kind} for device in self.devices]
        return frozenset(set.intersection(*found)) if found else frozenset()


def to_json(record: ProfileRecord) -> dict[str, Any]:
    return {"format": FORMAT, **dump(record, ProfileRecord)}


def from_json(values: dict[str, Any], where: str) -> ProfileRecord:
    """Raises StoreError, which names the file and what is wrong in it."""
    check_format(values, FORMAT, where)
    try:
        record: ProfileRecord = load({k: v for k, v in values.items() if k != "format"}, ProfileRecord)
    except CodecError as error:
        raise StoreError(f"{where}: damaged: {short(error)}; remove it, and measure again") from None
    return record


def _require(holds: bool, problem: str) -> None:
    if not holds:
        raise ValueError(problem)
