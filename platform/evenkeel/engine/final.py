"""After the last step: the last validation, and the whole model gathered on rank 0, one tensor at a time."""

from collections.abc import Iterator

import torch
from torch import Tensor

from evenkeel.core.boxes import Box, cut
from evenkeel.core.model import ParamShape
from evenkeel.engine.job import FinalTensors
from evenkeel.engine.training import Training


def finish(t: Training) -> float | None:
    """Validates the final version, and has the model written.

    Returns:
        The mean validation loss per token; None if nothing is validated.

    Raises:
        GroupBroken, GroupAborted, AbortedError, and on rank 0 what job.write_final raises.
    """
    t.progress.enter("finish")
    eval_loss = _validate(t)
    t.progress.enter("finish")
    if t.job.write_final is None:
        return eval_loss
    if t.place.rank == 0:
        params = [p for layer in t.job.shape.layers for p in layer.params]
        shapes = {p.name: p.shape for p in params}
        t.job.write_final(FinalTensors(shapes, t.memory.state.params.dtype, ((p.name, _gather(t, p)) for p in params)))
    else:
        for rank, param, box in _sources(t):
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


def _sources(t: Training, only: str | None = None) -> Iterator[tuple[int, ParamShape, Box]]:
    """(rank, parameter, box) of the parts that make up each parameter, in order: from the first pipeline, each once."""
    layout, parts = t.world.layout, t.world.layout.tensor
    for index, layer in enumerate(t.job.shape.layers):
        stage = next(s for s in layout.pipelines[0].stages if s.start <= index < s.stop)
        for param in layer.params:
            if only is None or param.name == only:
                for part in range(parts if param.split is not None else 1):
                    yield layout.places[stage.members[part]].rank, param, cut(param.shape, param.split, part, parts)


def _gather(t: Training, param: ParamShape) -> Tensor:
    """The whole parameter, on rank 0."""
    state = t.memory.state
    whole = torch.empty(param.shape, dtype=state.params.dtype)
    for rank, _, box in _sources(t, param.name):
        t.progress.check()
        if rank == t.place.rank:
            part = state.tensor(f"param/{param.name}")
        else:
            part = torch.empty(box.shape, dtype=whole.dtype, device=t.memory.device)
            with t.progress.communicating():
                t.groups.world.irecv(part, rank).wait()
        whole[box.slices] = part.cpu()
    return whole


def _send(t: Training, param: ParamShape, box: Box) -> None:
    state = t.memory.state
    assert state.boxes[param.name] == box
    t.progress.check()
    with t.progress.communicating():
        t.groups.world.isend(state.tensor(f"param/{param.name}").contiguous(), 0).wait()
