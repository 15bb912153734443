"""Which slices of the training state a place of a layout holds."""

from dataclasses import dataclass

from evenkeel.core.boxes import Box
from evenkeel.core.model import ModelShape, Shard
from evenkeel.plan.flat import ALIGNMENT, flat_places

KINDS = ("param", "exp_avg", "exp_avg_sq")
"""The three tensors of each parameter: itself and AdamW's moments. A tensor is named "KIND/PARAMETER"."""


@dataclass(frozen=True, slots=True, order=True)
class Slice:
    """A box of one tensor of the state, such as the rows 0 to 8 of "exp_avg/layers.0.attention.query"."""

    tensor: str
    box: Box


def slices(model: ModelShape, shard: Shard, alignment: int = ALIGNMENT) -> tuple[Slice, ...]:
    """All that a shard holds: per parameter, in the order of the layers, one slice of each kind; of parts, several."""
    if shard.owned is None:
        return tuple(Slice(f"{kind}/{param.name}", box) for param, box in shard.boxes(model) for kind in KINDS)
    found: list[Slice] = []
    for place in flat_places(model, shard, alignment):
        for start, stop in shard.owned:
            for box, _ in place.within(start, stop):
                found += [Slice(f"{kind}/{place.param.name}", box) for kind in KINDS]
    return tuple(found)
