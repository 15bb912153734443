"""Moves slices of the state between workers, so that everybody holds what the new layout wants of it.

Everything that goes from one worker to another goes as one message per element type: slices are packed side by side.
"""

from collections.abc import Iterator, Sequence
from itertools import groupby

import torch
from torch import Tensor

from evenkeel.core.ids import WorkerId
from evenkeel.engine.groups import Group, Pending
from evenkeel.engine.progress import Progress
from evenkeel.engine.slices import OwnedSlices
from evenkeel.engine.state import ShardState
from evenkeel.plan.reshard import Resharding, Transfer


def carry_out(
    plan: Resharding,
    me: WorkerId,
    target: ShardState,
    sources: Sequence[OwnedSlices],
    group: Group,
    progress: Progress,
) -> None:
    """This worker's part of a resharding: fills `target`, and sends what others lack.

    All members go through the pairs of workers in one order, so that nobody waits in a circle.

    Args:
        sources: what this worker holds of the version, only read; if `target` is among them it is left as it is.
        group: of all members; ranks are found by worker.

    Raises:
        GroupBroken, GroupAborted, AbortedError: `target` is undefined then, the sources are as before.
    """
    for piece in () if any(source is target for source in sources) else plan.kept.get(me, ()):
        source = next(s for s in sources if s.holds(piece.tensor, piece.box))
        target.view(piece.tensor, piece.box).copy_(source.view(piece.tensor, piece.box))
    rank = {worker: index for index, worker in enumerate(group.members)}
    sends: list[Pending] = []
    for (source_id, target_id), moves in _pairs(plan):
        progress.check()
        if source_id == me:
            packed = torch.cat([_read(sources, move) for move in moves]).to(target.params.device)
            with progress.communicating():
                sends.append(group.isend(packed, rank[target_id]))
        elif target_id == me:
            packed = target.params.new_empty(sum(move.box.size for move in moves))
            with progress.communicating():
                group.irecv(packed, rank[source_id]).wait()
            for move, part in zip(moves, torch.split(packed, [move.box.size for move in moves]), strict=True):
                target.view(move.tensor, move.box).copy_(part.view(move.box.shape))
    for send in sends:
        with progress.communicating():
            send.wait()
    target.publish()


def _pairs(plan: Resharding) -> Iterator[tuple[tuple[WorkerId, WorkerId], list[Transfer]]]:
    """Transfers by (source, target), in order of these, the same everywhere."""
    ordered = sorted(plan.transfers, key=_pair)  # stable: slices keep the order of the plan
    for pair, moves in groupby(ordered, key=_pair):
        yield pair, list(moves)


def _pair(move: Transfer) -> tuple[WorkerId, WorkerId]:
    return move.source, move.target


def _read(sources: Sequence[OwnedSlices], move: Transfer) -> Tensor:
    source = next(s for s in sources if s.holds(move.tensor, move.box))
    return source.view(move.tensor, move.box).reshape(-1)
