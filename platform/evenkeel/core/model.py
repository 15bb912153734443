"""The shape of a model, as planning needs it: layers in order, their parameters, and how those are cut."""

from collections.abc import Iterator
from dataclasses import dataclass

from evenkeel.core.boxes import Box, cut


@dataclass(frozen=True, slots=True)
class ParamShape:
    """One parameter: its name, full shape, and the dimension that TP cuts (None: every TP rank has all of it)."""

    name: str
    shape: tuple[int, ...]
    split: int | None = None


@dataclass(frozen=True, slots=True)
class LayerShape:
    """One layer of the sequence that a model is.

    Attributes:
        name: unique within the model.
        params: the parameters that live in this layer.
        cost: forward and backward time of one micro-batch, relative to the other layers.
        ties: names of parameters of earlier layers that this layer uses too (tied embeddings).
    """

    name: str
    params: tuple[ParamShape, ...]
    cost: float = 1.0
    ties: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class ModelShape:
    """A model as a sequence of layers; a stage is a range of them.

    Attributes:
        layers: in order of the forward pass; the first takes the input, the last ends in the loss.
        tensor_divides: a number that every TP degree must divide (heads, key-value heads, widths).
    """

    layers: tuple[LayerShape, ...]
    tensor_divides: int = 1

    @property
    def depth(self) -> int:
        return len(self.layers)

    def param(self, name: str) -> ParamShape:
        """Raises KeyError for a name that no layer has."""
        for layer in self.layers:
            for param in layer.params:
                if param.name == name:
                    return param
        raise KeyError(name)

    def params(self, start: int, stop: int) -> Iterator[ParamShape]:
        """Every parameter that layers start to stop need, each once, in order of first use."""
        seen: set[str] = set()
        for layer in self.layers[start:stop]:
            for param in (*(self.param(tie) for tie in layer.ties), *layer.params):
                if param.name not in seen:
                    seen.add(param.name)
                    yield param

    def tied(self) -> tuple[str, ...]:
        """Names of the parameters that more than one layer uses, in order of the layers."""
        return tuple(dict.fromkeys(tie for layer in self.layers for tie in layer.ties))


@dataclass(frozen=True, slots=True)
class Shard:
    """What one place of a layout holds of a model: a range of layers, cut `parts` ways, the `part`-th of them.

    Attributes:
        owned: the elements (start, stop) of the shard's flat buffers (plan/flat.py) of which it keeps the state; of the
            other parameters it has a copy to compute with, which is no source for anybody. None: all.
    """

    start: int
    stop: int
    part: int
    parts: int
    owned: tuple[tuple[int, int], ...] | None = None

    def boxes(self, model: ModelShape) -> Iterator[tuple[ParamShape, Box]]:
        """Each parameter of the shard with the box of it that is held here."""
        for param in model.params(self.start, self.stop):
            yield param, cut(param.shape, param.split, self.part, self.parts)
