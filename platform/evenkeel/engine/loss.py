"""Cross-entropy over a vocabulary that may be cut over tensor-parallel ranks; nobody gathers the logits."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from evenkeel.engine.parallel import TensorGroup

IGNORED = -100
"""A target with this value counts neither in the loss nor as a token."""


def cross_entropy(logits: Tensor, targets: Tensor, group: TensorGroup | None = None) -> tuple[Tensor, Tensor]:
    """Summed cross-entropy and the number of tokens in it.

    Args:
        logits: (..., vocabulary), or with a group this rank's slice (..., vocabulary / size). Computed in float32 at
            least, whatever they are.
        targets: (...), int64 indices into the whole vocabulary, or IGNORED.
        group: over whose ranks the vocabulary is cut, in order; None if it is whole.

    Returns:
        Loss, a scalar of float32 or float64, the same bits on every rank; tokens, an int64 scalar.
    """
    flat, wanted = logits.reshape(-1, logits.shape[-1]), targets.reshape(-1)
    tokens = (wanted != IGNORED).sum()
    if group is None:
        wide = flat if flat.dtype in (torch.float32, torch.float64) else flat.float()
        return F.cross_entropy(wide, wanted, reduction="sum", ignore_index=IGNORED), tokens
    loss: Tensor = _VocabParallel.apply(flat, wanted, group)  # type: ignore[no-untyped-call]
    return loss, tokens


class _VocabParallel(torch.autograd.Function):
    """One small all-reduce forward, none backward. The gradient is made in the forward pass, out of the exponentials
    that the loss needs anyway."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, group: TensorGroup) -> Tensor:
        x = logits if logits.dtype == torch.float64 else logits.float()
        width = x.shape[-1]
        local = targets - group.rank * width
        valid = targets != IGNORED
        here = (local >= 0) & (local < width)
        local = local.masked_fill(~here, 0).unsqueeze(-1)
        # A slice that is all -inf has no finite maximum to subtract.
        peak = x.amax(-1).clamp_min_(torch.finfo(x.dtype).min)
        exps = torch.exp(x - peak.unsqueeze(-1))
        mine = torch.stack((peak, exps.sum(-1), x.gather(-1, local).squeeze(-1).masked_fill(~here, 0)))
        # A sum with zeros is a gather: each rank fills its row, and all combine the rows in the same order.
        rows = mine.new_zeros(group.size, *mine.shape)
        rows[group.rank] = mine
        group.all_reduce(rows)
        peaks, sums, picked = rows.unbind(1)
        top = peaks.amax(0)
        total = (sums * torch.exp(peaks - top)).sum(0)
        loss = (top + total.log() - picked.sum(0)).masked_fill(~valid, 0).sum()
        if ctx.needs_input_grad[0]:
            share = (torch.exp(peak - top) / total).masked_fill(~valid, 0)
            grad = exps.mul_(share.unsqueeze(-1))
            grad.scatter_add_(-1, local, -(here & valid).to(grad.dtype).unsqueeze(-1))
            ctx.save_for_backward(grad.to(logits.dtype))
        return loss

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (grad,) = ctx.saved_tensors
        return grad * grads[0], None, None
