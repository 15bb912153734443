"""After the last step: the last validation, and the whole model gathered on rank 0, one tensor at a time."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from evenkeel.core.boxes import Box
from evenkeel.core.model import ParamShape
from evenkeel.engine.job import FinalTensors
from evenkeel.engine.training import Training
from evenkeel.plan.writers import written_by


def finish(t: Training) -> float | None:
    """Validates the final version, and has the model written.

    Returns:
        The mean validation loss per token; None if nothing is validated.

    Raises:
        GroupBroken, GroupAborted, AbortedError, and on rank 0 what job.write_final raises.
    """
    t.progress.enter("finish")
    t.sums.publish()
    t.sums.ready()
    eval_loss = _validate(t)
    t.progress.enter("finish")
    if t.job.write_final is None:
        return eval_loss
    params = [p for layer in t.job.shape.layers for p in layer.params]
    if t.place.rank == 0:
        shapes = {p.name: p.shape for p in params}
        t.job.write_final(FinalTensors(shapes, t.memory.state.params.dtype, _tensors(t, params)))
    else:
        parts = _parts(t)
        for param in params:
            for rank, box in parts.get(param.name, ()):
                if rank == t.place.rank:
                    _send(t, param, box)
    return eval_loss


def _validate(t: Training) -> float | None:
    if t.job.eval is None or not t.settings.eval_every:
        return None
    sums = t.evaluate()
    both = torch.tensor([sums.loss, sums.tokens], dtype=torch.float64, device=t.memory.device)
    with t.progress.communicating():
        t.groups.world.all_reduce(both)
    loss, tokens = both.tolist()
    return loss / tokens if tokens else None


def _parts(t: Training) -> dict[str, list[tuple[int, Box]]]:
    """By parameter the boxes that make it up, each with the rank of its first owner."""
    layout, model = t.world.layout, t.job.shape
    parts: dict[str, list[tuple[int, Box]]] = {}
    for worker in layout.members:
        for span in written_by(worker, t.copies, layout, model):
            for piece in span.pieces:
                parts.setdefault(piece.param.name, []).append((layout.places[worker].rank, piece.box))
    return parts


def _tensors(t: Training, params: Sequence[ParamShape]) -> Iterator[tuple[str, Tensor]]:
    """Each is asked for when the one before is written."""
    parts = _parts(t)
    for param in params:
        t.progress.moved()
        yield param.name, _gather(t, param, parts.get(param.name, ()))


def _gather(t: Training, param: ParamShape, parts: Sequence[tuple[int, Box]]) -> Tensor:
    """The whole parameter, on rank 0."""
    state = t.memory.state
    whole = torch.empty(param.shape, dtype=state.params.dtype)
    for rank, box in parts:
        t.progress.check()
        if rank == t.place.rank:
            part = state.view(f"param/{param.name}", box)
        else:
            part = torch.empty(box.shape, dtype=whole.dtype, device=t.memory.device)
            with t.progress.communicating():
                t.groups.world.irecv(part, rank).wait()
        whole[box.slices] = part.cpu()
    return whole


def _send(t: Training, param: ParamShape, box: Box) -> None:
    t.progress.check()
    with t.progress.communicating():
        t.groups.world.isend(t.memory.state.view(f"param/{param.name}", box).contiguous(), 0).wait()
