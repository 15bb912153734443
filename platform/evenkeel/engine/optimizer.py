"""AdamW over the flat buffers of a shard, and the scale of its gradients. The rate is in plan/learning_rate.py."""

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from evenkeel.engine.state import ShardState
from evenkeel.plan.learning_rate import learning_rate
from evenkeel.plan.state import KINDS

__all__ = ["AdamW", "gradient_scale", "learning_rate"]


def gradient_scale(tokens: float, grad_norm: float, grad_clip: float) -> float:
    """What summed gradients are divided by: the tokens, and more where their mean's norm is above `grad_clip`.

    Args:
        tokens: of the global batch, or what else the loss counts; above 0.
        grad_norm: of the mean gradient.
        grad_clip: 0 is no clipping.
    """
    clipped = grad_clip > 0 and grad_norm > grad_clip
    return tokens * (grad_norm / grad_clip) if clipped else tokens


class AdamW:
    """Decoupled weight decay (Loshchilov and Hutter, 2019) on matrices, none on biases and norms.

    The bias correction counts the run's steps, also those that were skipped, so that it is a function of the step
    alone and no further state has to be kept, moved and saved. Without skipped steps it is torch.optim.AdamW.

    Neighbouring regions are stepped as one tensor, as far as they are owned here. As all of these end on 64-byte
    boundaries, vector units never meet a tail, and holders of the same slice get the same bits however they are cut.
    """

    def __init__(
        self,
        state: ShardState,
        *,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.1,
    ) -> None:
        self._state = state
        self._betas, self._eps = betas, eps
        self._groups = [(decay, _tensors(state, decay is not None)) for decay in (weight_decay, None)]

    def step(self, step: int, lr: float, scale: float) -> None:
        """Updates parameters and moments, and gives the modules the new parameters.

        Args:
            step: of the run, from 1.
            scale: gradients are divided by it, in the buffers; see gradient_scale.
        """
        grad_scale: Tensor | None = None
        if self._state.grads.dtype == torch.float64:
            self._state.grads.div_(scale)  # fused kernels take a float32 scale, too coarse here
        else:
            grad_scale = torch.tensor(scale, dtype=torch.float32, device=self._state.grads.device)
        for decay, (params, grads, exp_avgs, exp_avg_sqs) in self._groups:
            if not params:
                continue
            steps = list(torch.full((len(params),), step - 1.0, device=params[0].device).unbind())
            adamw(
                params,
                grads,
                exp_avgs,
                exp_avg_sqs,
                [],
                steps,
                fused=True,
                grad_scale=grad_scale,
                amsgrad=False,
                beta1=self._betas[0],
                beta2=self._betas[1],
                lr=lr,
                weight_decay=decay or 0.0,
                eps=self._eps,
                maximize=False,
            )
        self._state.publish()


def _tensors(state: ShardState, decay: bool) -> tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor]]:
    """Parameters, gradients and both moments of the decayed or the other regions, neighbours as one tensor."""
    spans: list[tuple[int, int]] = []
    for first, last in state.owned:
        for region in state.regions:
            start, stop = max(first, region.start), min(last, region.stop)
            if region.decay != decay or start >= stop:
                continue
            if spans and spans[-1][1] == start > first:
                start = spans.pop()[0]
            spans.append((start, stop))
    params, exp_avgs, exp_avg_sqs = ([state.range(kind, *span) for span in spans] for kind in KINDS)
    return params, [state.grads[start:stop] for start, stop in spans], exp_avgs, exp_avg_sqs
