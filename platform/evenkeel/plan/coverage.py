"""Whether a set of holders has all of a model's state between them."""

from collections.abc import Iterable

from evenkeel.core.ids import NodeId, WorkerId
from evenkeel.core.model import ModelShape, Shard
from evenkeel.plan.reshard import reshard
from evenkeel.plan.state import slices


def lost_slices(model: ModelShape, shards: Iterable[Shard]) -> tuple[str, ...]:
    """Names of the state tensors of which at least a part is in none of the shards, in order of the layers."""
    distinct = sorted(set(shards), key=lambda s: (s.start, s.stop, s.parts, s.part, s.owned or ()))
    holds = {WorkerId(f"{i}"): slices(model, shard) for i, shard in enumerate(distinct)}
    reader = WorkerId("reader")
    wants = {reader: slices(model, Shard(0, model.depth, 0, 1))}
    nodes = {worker: NodeId("") for worker in (*holds, reader)}
    return tuple(dict.fromkeys(missing.tensor for missing in reshard(wants, holds, nodes).lost))
