"""Whether a set of holders has all of a model's state between them, and which few of them have it too."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import pairwise, product

from evenkeel.core.boxes import Box
from evenkeel.core.ids import NodeId, WorkerId
from evenkeel.core.model import ModelShape, Shard
from evenkeel.core.world import Source
from evenkeel.plan.flat import ALIGNMENT, flat_places
from evenkeel.plan.reshard import reshard
from evenkeel.plan.state import KINDS, slices


def lost_slices(model: ModelShape, shards: Iterable[Shard]) -> tuple[str, ...]:
    """Names of the state tensors of which at least a part is in none of the shards, in order of the layers.

    Only layers of which not all TP ranks are among the shards are looked at tensor by tensor: as long as a copy of
    everything is alive, that is none of them, which is what makes thousands of holders quick.
    """
    united = _united(model, shards)
    here = _layers_of_all_ranks(united)
    doubtful = [layer for i, layer in enumerate(model.layers) if i not in here]
    tensors = {f"{kind}/{param.name}" for layer in doubtful for param in layer.params for kind in KINDS}
    if not tensors:
        return ()
    holds = {WorkerId(f"{i}"): slices(model, shard) for i, shard in enumerate(united)}
    reader = WorkerId("reader")
    wants = {reader: [piece for piece in slices(model, Shard(0, model.depth, 0, 1)) if piece.tensor in tensors]}
    nodes = {worker: NodeId("") for worker in (*holds, reader)}
    return tuple(dict.fromkeys(missing.tensor for missing in reshard(wants, holds, nodes).lost))


def _united(model: ModelShape, shards: Iterable[Shard]) -> list[Shard]:
    """Shards that have between them what the given ones have: one for each place, with all that its holders own."""
    owned: dict[tuple[int, int, int, int], list[tuple[int, int]]] = {}
    whole: set[Shard] = set()
    objects = {id(shard): shard for shard in shards}  # many workers may share one
    for shard in set(objects.values()):
        if shard.owned is None:
            whole.add(shard)
        else:
            owned.setdefault((shard.start, shard.stop, shard.part, shard.parts), []).extend(shard.owned)
    parts = ((Shard(*place), ranges) for place, ranges in owned.items())
    united = whole | {_with(model, shard, ranges) for shard, ranges in parts if shard not in whole}
    return sorted(united, key=lambda s: (s.start, s.stop, s.parts, s.part))


def _with(model: ModelShape, shard: Shard, owned: list[tuple[int, int]]) -> Shard:
    """The shard with these ranges of its flat buffers: all of it, if they are."""
    joined: list[tuple[int, int]] = []
    for start, stop in sorted(owned):
        if joined and start <= joined[-1][1]:
            joined[-1] = (joined[-1][0], max(stop, joined[-1][1]))
        else:
            joined.append((start, stop))
    places = flat_places(model, shard, ALIGNMENT)
    size = places[-1].stop if places else 0
    return shard if joined == [(0, size)] else replace(shard, owned=tuple(joined))


def _layers_of_all_ranks(shards: Iterable[Shard]) -> set[int]:
    """Layers of which these have all TP ranks of one degree, each whole."""
    ranks: dict[tuple[int, int], set[int]] = {}
    for shard in shards:
        if shard.owned is None:
            for layer in range(shard.start, shard.stop):
                ranks.setdefault((layer, shard.parts), set()).add(shard.part)
    return {layer for (layer, parts), found in ranks.items() if len(found) == parts}


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
