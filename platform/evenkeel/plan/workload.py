"""What a model asks of the devices, layer by layer: counted, or measured on the device (see engine, profile)."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from evenkeel.plan.hardware import Link


@dataclass(frozen=True, slots=True)
class LayerWork:
    """One layer's work on one micro-batch, of the whole layer (TP 1).

    Attributes:
        forward_flops, backward_flops: of its matrix products; a multiplication and an addition are two.
        params: elements.
        split_params: those of them that tensor parallelism cuts; the others are on every TP rank.
        kept_bytes: what is kept of the forward pass for the backward pass.
        split_kept_bytes: the part of kept_bytes that tensor parallelism cuts.
        output_bytes: what goes to the next layer, and as much comes back as its gradient.
        tensor_bytes: what a TP group sums (all-reduce) in the forward pass, and as much again in the backward pass.
    """

    name: str
    forward_flops: float
    backward_flops: float
    params: int
    split_params: int
    kept_bytes: int
    split_kept_bytes: int
    output_bytes: int
    tensor_bytes: int


@dataclass(frozen=True, slots=True)
class Workload:
    """A model with its micro-batch.

    Attributes:
        precision: train.precision, which says how wide parameters, gradients and optimizer state are (plan/memory.py).
        tokens: of one micro-batch.
        tensor_divides: every TP degree must divide it (ModelShape).
        recompute: stages keep only what enters each layer, and run it forward again in the backward pass.
    """

    layers: tuple[LayerWork, ...]
    precision: str
    tokens: int
    tensor_divides: int = 1
    recompute: bool = False


@dataclass(frozen=True, slots=True)
class LayerTime:
    """Seconds of one layer for one micro-batch, with all that it waits for inside its TP group."""

    forward_s: float
    backward_s: float

    @property
    def total_s(self) -> float:
        return self.forward_s + self.backward_s


@dataclass(frozen=True, slots=True)
class Profile:
    """What was measured, and is believed before anything that is counted.

    Attributes:
        layers: by the name of the kind of device and TP degree, a time for each layer of the model.
        links: by the two kinds of device, in alphabetical order, and "inside" or "between" nodes.
        kept_bytes: of each layer for one micro-batch, at TP 1; empty if that was not measured.
    """

    layers: Mapping[tuple[str, int], tuple[LayerTime, ...]] = field(default_factory=dict)
    links: Mapping[tuple[str, str, str], Link] = field(default_factory=dict)
    kept_bytes: tuple[int, ...] = ()
