"""Where the parameters of a shard lie in its flat buffers, and which boxes a range of such a buffer is.

Ranges are what is summed and updated, boxes are what is held and moved; `flat_boxes` turns the one into the other.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from evenkeel.core.boxes import Box
from evenkeel.core.model import ModelShape, ParamShape, Shard

ALIGNMENT = 64
"""From one parameter's first element to the next one's is a multiple of this: at least 64 bytes for every dtype, as CPU
kernels sum in another order elsewhere, and the same for all, so that a range means the same whatever the dtype."""


@dataclass(frozen=True, slots=True)
class Place:
    """The held box of one parameter, row by row from element `start` of the flat buffers.

    Attributes:
        layer: index of the layer, -1 for a tied parameter.
        stop: where the next parameter begins; the gap after the box stays zero.
    """

    param: ParamShape
    box: Box
    layer: int
    start: int
    stop: int

    def within(self, start: int, stop: int) -> Iterator[tuple[Box, int]]:
        """What of the box lies in elements start to stop of the buffers, as boxes, each with where it begins there."""
        first, last = max(start, self.start), min(stop, self.start + self.box.size)
        for box in flat_boxes(self.box, first - self.start, last - self.start):
            yield box, first
            first += box.size


def flat_places(model: ModelShape, shard: Shard, alignment: int) -> tuple[Place, ...]:
    """The shard's parameters in the order of the flat buffers.

    Tied parameters first, then layer by layer, within a layer what tensor parallelism cuts before what it replicates,
    and matrices before vectors; so what one group sums is one range, whatever the cuts of other pipelines are.

    Args:
        alignment: of each parameter, in elements.
    """
    tied = model.tied()
    boxes = {param.name: (param, box) for param, box in shard.boxes(model)}
    order = [(-1, boxes[name][0]) for name in tied if name in boxes]
    for layer in range(shard.start, shard.stop):
        untied = [param for param in model.layers[layer].params if param.name not in tied]
        order += [(layer, p) for p in sorted(untied, key=lambda p: (p.split is None, len(p.shape) < 2))]
    places: list[Place] = []
    start = 0
    for layer, param in order:
        box = boxes[param.name][1]
        stop = start + -(-box.size // alignment) * alignment
        places.append(Place(param, box, layer, start, stop))
        start = stop
    return tuple(places)


def flat_boxes(box: Box, start: int, stop: int) -> Iterator[Box]:
    """The elements start to stop of a box, counted row by row, as boxes in that order: at most 2d - 1 in d dimensions.

    Two of a matrix are parts of rows where the range begins and ends, the third the whole rows between them.
    """
    if start >= stop:
        return
    if start == 0 and stop == box.size:
        yield box
        return
    dim = next(d for d, side in enumerate(box.shape) if side > 1)
    row = box.size // box.shape[dim]
    first, before = divmod(start, row)
    last, after = divmod(stop, row)
    if first == last:
        yield from flat_boxes(rows(box, dim, first, first + 1), before, after)
        return
    if before:
        yield from flat_boxes(rows(box, dim, first, first + 1), before, row)
        first += 1
    if first < last:
        yield rows(box, dim, first, last)
    if after:
        yield from flat_boxes(rows(box, dim, last, last + 1), 0, after)


def rows(box: Box, dim: int, first: int, last: int) -> Box:
    """The box's indices first to last of dimension `dim`, counted from the box's own start."""
    origin = box.start[dim]
    start = (*box.start[:dim], origin + first, *box.start[dim + 1 :])
    return Box(start, (*box.stop[:dim], origin + last, *box.stop[dim + 1 :]))
