"""Who writes what of a checkpoint: each slice once, by the first of its owners."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from evenkeel.core.boxes import Box
from evenkeel.core.ids import WorkerId
from evenkeel.core.layout import Layout
from evenkeel.core.model import ModelShape, ParamShape
from evenkeel.plan.copies import Copies, with_origins
from evenkeel.plan.flat import ALIGNMENT, flat_places


@dataclass(frozen=True, slots=True)
class Piece:
    """A box of a parameter, whose elements lie in a row from element `start` of the shard's flat buffers on."""

    param: ParamShape
    box: Box
    start: int


@dataclass(frozen=True, slots=True)
class Span:
    """Elements start to stop of a shard's flat buffers, and the pieces in them that are to be written.

    The rest is gaps, and what another TP rank writes because all hold it.
    """

    start: int
    stop: int
    pieces: tuple[Piece, ...]


def ranges_written(
    copies: Copies, layout: Layout, model: ModelShape, alignment: int = ALIGNMENT
) -> Mapping[WorkerId, Sequence[tuple[int, int]]]:
    """The spans (start, stop) that each member writes, of all at once: see `written_by`."""
    found: dict[WorkerId, list[tuple[int, int]]] = {worker: [] for worker in layout.members}
    for ownership, origins in with_origins(copies, layout, model, alignment):
        for part in ownership.parts:
            origin = origins[part.owners[0]]
            found[part.owners[0]].append((origin + part.start, origin + part.stop))
    return found


def written_by(
    worker: WorkerId, copies: Copies, layout: Layout, model: ModelShape, alignment: int = ALIGNMENT
) -> tuple[Span, ...]:
    """What this worker writes, of each kind of tensor; the pieces of all workers tile every parameter.

    Args:
        alignment: of parameters in the flat buffers, in elements, as for `copies`.
    """
    starts = {place.param.name: place.start for place in flat_places(model, layout.shard(worker), alignment)}
    spans: list[Span] = []
    for ownership in copies.groups:
        if worker not in ownership.group.members:
            continue
        origin = starts[ownership.places[0].param.name]
        for part in ownership.parts:
            if part.owners[0] != worker:
                continue
            pieces: list[Piece] = []
            for place in ownership.places:
                if place.param.split is not None or ownership.group.part == 0:
                    pieces += [Piece(place.param, box, origin + at) for box, at in place.within(part.start, part.stop)]
            spans.append(Span(origin + part.start, origin + part.stop, tuple(pieces)))
    return tuple(spans)
