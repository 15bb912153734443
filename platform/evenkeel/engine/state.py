"""The training state of one shard: parameters, gradients and AdamW's moments, each in one flat buffer.

The order of the buffers depends on the shard alone: tied parameters first, then layer by layer, within a layer what
tensor parallelism cuts before what it replicates, and what is decayed before what is not. Every group that sums
gradients (core.layout.sync_groups) is therefore one contiguous range, whatever the cuts of other pipelines are, and a
worker whose shard stays the same through a change of world keeps its buffers as they are.

Each tensor begins on a 64-byte boundary, because CPU kernels sum in another order elsewhere; the gaps stay zero.

Where a worker owns but a part of its shard's state (redundancy.copies below the number of pipelines), gradients and the
parameters that it computes with are whole all the same; the moments, and under bf16 the float32 parameters, are only of
its ranges, one behind the other.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor, nn

from evenkeel.core.boxes import Box
from evenkeel.core.model import ModelShape, Shard
from evenkeel.engine.model import Model, Stage, build_stage, cast, initial_values
from evenkeel.engine.parallel import TensorGroup, set_group
from evenkeel.engine.slices import OwnedSlices
from evenkeel.plan.flat import ALIGNMENT, Place, flat_places
from evenkeel.plan.state import KINDS

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp64": torch.float64}


@dataclass(frozen=True, slots=True)
class Region:
    """A contiguous range of the flat buffers whose parameters are treated alike.

    Attributes:
        start, stop: in elements.
        layer: index of the layer, -1 for tied parameters.
        cut: whether tensor-parallel ranks hold different parts; if not, one of them counts it in the norm.
        decay: whether weight decay applies: to matrices, not to biases and norms.
        names: of the parameters.
    """

    start: int
    stop: int
    layer: int
    cut: bool
    decay: bool
    names: tuple[str, ...]

    @property
    def span(self) -> slice:
        return slice(self.start, self.stop)


class ShardState(OwnedSlices):
    """What one worker holds of the state, and the modules that compute with it.

    With precision "bf16" modules hold bfloat16 copies of float32 parameters, and each micro-batch's gradients are
    added up in float32; else the modules' parameters and their `.grad` are views into the buffers themselves.

    Attributes:
        stage: the shard's layers.
        compute: flat, what the modules compute with.
        grads: flat, like `compute`; float64 with precision "fp64", else float32.
        params, exp_avg, exp_avg_sq: flat, of the type of `grads`. `params` is `compute` itself if that has the same
            type; the moments, and `params` otherwise, hold only what is owned.
        owned: the ranges (start, stop) of `compute` of which the state is kept here.
        regions: of the buffers, in order.
        boxes: which box of each parameter is computed with, by full name.
    """

    def __init__(
        self,
        model: Model,
        shape: ModelShape,
        shard: Shard,
        precision: str = "fp32",
        device: torch.device | str = "cpu",
        seed: int = 0,
    ) -> None:
        compute = PRECISIONS[precision]
        master = torch.float64 if precision == "fp64" else torch.float32
        places = flat_places(shape, shard, ALIGNMENT)
        size = places[-1].stop if places else 0
        super().__init__(shard, places, ((0, size),) if shard.owned is None else shard.owned)
        self._model = model
        self.regions = tuple(_regions(places))
        self._places = {place.param.name: place for place in places}
        self.boxes: Mapping[str, Box] = {name: place.box for name, place in self._places.items()}
        self.compute = torch.zeros(size, dtype=compute, device=device)
        self.grads = torch.zeros(size, dtype=master, device=device)
        self.params = self.compute if compute == master else torch.zeros(self.size, dtype=master, device=device)
        self.exp_avg, self.exp_avg_sq = (torch.zeros(self.size, dtype=master, device=device) for _ in range(2))
        self._flat = dict(zip(KINDS, (self.params, self.exp_avg, self.exp_avg_sq), strict=True))
        stage = build_stage(model, shard.start, shard.stop, shard.part, shard.parts, device, seed)
        self.stage = self._with_parameters(cast(stage, compute))

    def _with_parameters(self, stage: Stage) -> Stage:
        for name, place in self._places.items():
            parameter = nn.Parameter(_view(self.compute, place))
            if self.compute is self.params:
                parameter.grad = _view(self.grads, place)
            else:
                add = _adder(_view(self.grads, place))
                parameter.register_post_accumulate_grad_hook(add)  # type: ignore[no-untyped-call]
            stage.assign(name, parameter)
        return stage

    def set_group(self, group: TensorGroup | None) -> None:
        """Makes the stage's parallel layers sum over the group of this generation."""
        set_group(self.stage, group)

    def tensor(self, name: str) -> Tensor:
        """A view of the box of the tensor "param/NAME", "exp_avg/NAME" or "exp_avg_sq/NAME".

        After writing to parameters through it, call `publish`.

        Raises:
            KeyError: for what this shard does not own, all of it.
        """
        return self.view(name, self.box(name))

    def range(self, kind: str, start: int, stop: int) -> Tensor:
        flat = self._flat[kind]
        at = start if flat is self.compute else self.offset(start, stop)
        return flat[at : at + stop - start]

    def shape(self, name: str) -> tuple[int, ...]:
        """Of the whole tensor "KIND/NAME" of which a box is held. Raises KeyError for what this shard does not hold."""
        return self._places[name.partition("/")[2]].param.shape

    def grad(self, parameter: str) -> Tensor:
        """A view of the summed gradient of the held box of a parameter."""
        return _view(self.grads, self._places[parameter])

    def box(self, name: str) -> Box:
        """Which box of the tensor "KIND/NAME" is held. Raises KeyError for what this shard does not hold."""
        return self.boxes[name.partition("/")[2]]

    def span(self, parameters: Iterable[str]) -> slice:
        """The range of the flat buffers that one sync group's parameters take up, with the gaps within.

        Raises:
            KeyError: for parameters that this shard does not hold.
            ValueError: if they are not exactly those of a contiguous range.
        """
        names = set(parameters)
        missing = names - self._places.keys()
        if missing:
            raise KeyError(min(missing))
        inside = [region for region in self.regions if not names.isdisjoint(region.names)]
        span = slice(inside[0].start, inside[-1].stop)
        held = [n for r in self.regions if span.start <= r.start < span.stop for n in r.names]
        if len(held) != len(names):
            raise ValueError(f"{sorted(names)} are not a contiguous range of whole regions")
        return span

    def zero_grad(self) -> None:
        self.grads.zero_()

    def initialise(self, seed: int, moved: Callable[[], None] = lambda: None) -> None:
        """Version 0: parameters by seed and name, moments zero. Calls `moved` before each parameter."""
        shapes = {name: self._places[name].param.shape for name, owned in self._pieces.items() if owned}
        for name, whole in initial_values(self._model, seed, shapes):
            moved()
            for box, _ in self._pieces[name]:
                self.view(f"param/{name}", box).copy_(whole[box.slices])
        self.exp_avg.zero_()
        self.exp_avg_sq.zero_()
        self.publish()

    def publish(self) -> None:
        """Gives the modules the owned parameters as they are now; needed after every write to `params`."""
        if self.compute is not self.params:
            for start, stop in self.owned:
                self.compute[start:stop].copy_(self.range("param", start, stop))


def _regions(places: Iterable[Place]) -> Iterator[Region]:
    """Neighbours of one layer that are treated alike, as one; each tied parameter for itself."""

    def alike(place: Place) -> tuple[int, bool, bool, str]:
        tied = place.param.name if place.layer < 0 else ""
        return place.layer, place.param.split is not None, len(place.param.shape) >= 2, tied

    for (layer, cut, decay, _), group in groupby(places, key=alike):
        inside = list(group)
        yield Region(inside[0].start, inside[-1].stop, layer, cut, decay, tuple(place.param.name for place in inside))


def _view(flat: Tensor, place: Place) -> Tensor:
    return flat[place.start : place.start + place.box.size].view(place.box.shape)


def _adder(total: Tensor) -> Callable[[Tensor], None]:
    def add(parameter: Tensor) -> None:
        assert parameter.grad is not None
        total.add_(parameter.grad)
        parameter.grad = None

    return add
