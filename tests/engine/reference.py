"""The plain loop that every layout must agree with: one process, one model; of the engine only its keyed dropout."""

import torch
from torch import Tensor

from evenkeel.engine.model import Model, whole_model
from evenkeel.engine.random import RandomKey, bind_random


def train(
    model: Model, samples: Tensor, targets: Tensor, orders: list[list[list[int]]], *, seed: int, dtype: torch.dtype,
    rates: list[float], weight_decay: float, betas: tuple[float, float], eps: float, clip: float,
) -> tuple[list[float], dict[str, Tensor]]:
    """Trains len(orders) steps; orders[s][m] are the samples of micro-batch m of step s + 1.

    Returns:
        The mean loss per token of each step, and the final parameters by name.
    """
    stage = whole_model(model, seed, dtype)
    key = RandomKey(seed)
    bind_random(stage, key)
    params = dict(stage.named())
    matrices = [p for p in params.values() if p.ndim >= 2]
    others = [p for p in params.values() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=betas, eps=eps)
    losses: list[float] = []
    for step, (rate, micros) in enumerate(zip(rates, orders, strict=True), 1):
        optimizer.zero_grad()
        total, tokens = 0.0, 0
        for micro, indices in enumerate(micros):
            key.at(step, micro)
            loss, counted = model.loss(stage(samples[indices]), targets[indices], None)
            loss.backward()
            total, tokens = total + loss.item(), tokens + int(counted)
        gradients = [p.grad for p in params.values() if p.grad is not None]
        torch._foreach_div_(gradients, tokens)
        norm = torch.nn.utils.get_total_norm(gradients).item()
        if 0 < clip < norm:
            torch._foreach_mul_(gradients, clip / norm)
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        losses.append(total / tokens)
    return losses, {name: p.detach() for name, p in params.items()}
