"""Moves slices of the state between workers, so that everybody holds what the new layout wants of it.

What goes from one worker to another goes in batches of slices packed side by side, so that the memory that this takes
is bounded, and the controller sees that it goes on however long it takes.
"""

from collections.abc import Iterator, Sequence
from itertools import groupby

import torch
from torch import Tensor

from evenkeel.core.batches import batches
from evenkeel.core.ids import WorkerId
from evenkeel.engine.groups import Group, Pending
from evenkeel.engine.progress import Progress
from evenkeel.engine.slices import OwnedSlices
from evenkeel.engine.state import ShardState
from evenkeel.plan.reshard import Resharding, Transfer

BATCH_BYTES = 64 * 1024 * 1024
"""From one worker to another in one go; a larger slice goes alone."""


def carry_out(
    plan: Resharding,
    me: WorkerId,
    target: ShardState,
    sources: Sequence[OwnedSlices],
    group: Group,
    progress: Progress,
) -> None:
    """This worker's part of a resharding: fills `target`, and sends what others lack.

    In each round all members go through the pairs of workers in one order, and nobody waits for what it sends before it
    has received what it is sent, so that nobody waits in a circle.

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
    for batch in _rounds(plan, me, target.params.element_size()):
        sends: list[Pending] = []
        for (source_id, target_id), moves in batch:
            progress.moved()
            if source_id == me:
                packed = torch.cat([_read(sources, move) for move in moves]).to(target.params.device)
                with progress.communicating():
                    sends.append(group.isend(packed, rank[target_id]))
            else:
                packed = target.params.new_empty(sum(move.box.size for move in moves))
                with progress.communicating():
                    group.irecv(packed, rank[source_id]).wait()
                for move, part in zip(moves, torch.split(packed, [move.box.size for move in moves]), strict=True):
                    target.view(move.tensor, move.box).copy_(part.view(move.box.shape))
        with progress.communicating():
            for send in sends:
                send.wait()
            group.drain()
    target.publish()


_Pair = tuple[WorkerId, WorkerId]


def _rounds(plan: Resharding, me: WorkerId, element_size: int) -> Iterator[list[tuple[_Pair, list[Transfer]]]]:
    """This worker's first batches from and to everybody, then its second ones, and so on.

    Whoever is behind is in an earlier round, so the one that is furthest behind never waits for another round's batch.
    """
    queues = [
        (pair, batches(moves, lambda move: move.box.size * element_size, BATCH_BYTES))
        for pair, moves in _pairs(plan)
        if me in pair
    ]
    while batch := [(pair, moves) for pair, queue in queues if (moves := next(queue, []))]:
        yield batch


def _pairs(plan: Resharding) -> Iterator[tuple[_Pair, list[Transfer]]]:
    """Transfers by (source, target), in order of these, the same everywhere."""
    ordered = sorted(plan.transfers, key=_pair)  # stable: slices keep the order of the plan
    for pair, moves in groupby(ordered, key=_pair):
        yield pair, list(moves)


def _pair(move: Transfer) -> _Pair:
    return move.source, move.target


def _read(sources: Sequence[OwnedSlices], move: Transfer) -> Tensor:
    source = next(s for s in sources if s.holds(move.tensor, move.box))
    return source.view(move.tensor, move.box).reshape(-1)
