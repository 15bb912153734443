"""Whether a set of holders has all of a model's state between them, and which few of them have it too."""

from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise, product

from evenkeel.core.boxes import Box
from evenkeel.core.ids import NodeId, WorkerId
from evenkeel.core.model import ModelShape, Shard
from evenkeel.core.world import Source
from evenkeel.plan.reshard import reshard
from evenkeel.plan.state import KINDS, slices


def lost_slices(model: ModelShape, shards: Iterable[Shard]) -> tuple[str, ...]:
    """Names of the state tensors of which at least a part is in none of the shards, in order of the layers."""
    distinct = sorted(set(shards), key=lambda s: (s.start, s.stop, s.parts, s.part, s.owned or ()))
    holds = {WorkerId(f"{i}"): slices(model, shard) for i, shard in enumerate(distinct)}
    reader = WorkerId("reader")
    wants = {reader: slices(model, Shard(0, model.depth, 0, 1))}
    nodes = {worker: NodeId("") for worker in (*holds, reader)}
    return tuple(dict.fromkeys(missing.tensor for missing in reshard(wants, holds, nodes).lost))


def few_that_have_all(model: ModelShape, sources: Iterable[Source]) -> tuple[WorkerId, ...]:
    """Few workers that have between them all that the sources have; among equals the first ones.

    Not always the fewest: what fewest have is next, and of those who have it, who has most that is missing.
    """
    held: dict[str, list[tuple[WorkerId, Box]]] = {}
    for source in sources:
        for piece in slices(model, source.shard):
            if piece.tensor.startswith(f"{KINDS[0]}/"):  # the others are cut alike
                held.setdefault(piece.tensor, []).append((source.worker_id, piece.box))
    missing = dict.fromkeys(
        tuple(dict.fromkeys(worker for worker, box in pieces if box.contains(cell)))
        for pieces in held.values()
        for cell in _cells([box for _, box in pieces])
    )
    few: list[WorkerId] = []
    left = sorted(filter(None, missing), key=len)
    while left:
        few.append(max(left[0], key=lambda worker: sum(worker in holders for holders in left)))
        left = [holders for holders in left if few[-1] not in holders]
    return tuple(few)


def _cells(boxes: Sequence[Box]) -> Iterator[Box]:
    """What the sides of these boxes of one tensor cut it into: each cell is within a box or outside it."""
    dimensions = range(len(boxes[0].start))
    sides = [sorted({side for box in boxes for side in (box.start[d], box.stop[d])}) for d in dimensions]
    for spans in product(*(pairwise(side) for side in sides)):
        yield Box(tuple(start for start, _ in spans), tuple(stop for _, stop in spans))
