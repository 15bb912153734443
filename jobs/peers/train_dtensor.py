"""Peer: tensor parallelism by DTensor (parallelize_module) under torchrun. Arguments: work.yaml, output folder.

Attention and feed-forward are cut as in ours. Embedding and head stay whole on every rank: cut over the vocabulary,
with torch's loss_parallel (--vocabulary), this peer is slower at this size, and a peer runs at its best.
"""

import sys
from collections.abc import Sequence
from contextlib import nullcontext

import torch
import torch.distributed as dist
from common import Record, Work, mean_loss, one_thread
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, loss_parallel, parallelize_module
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

BLOCK = {
    "attention.query": ColwiseParallel,
    "attention.key": ColwiseParallel,
    "attention.value": ColwiseParallel,
    "attention.output": RowwiseParallel,
    "feed_forward.gate": ColwiseParallel,
    "feed_forward.up": ColwiseParallel,
    "feed_forward.down": RowwiseParallel,
}


def clip(groups: Sequence[Sequence[nn.Parameter]], max_norm: float) -> None:
    """By the norm over DTensors and plain tensors together; torch's own function does not take a mixture."""
    norms = [get_total_norm([p.grad for p in params if p.grad is not None]) for params in groups]
    whole = [norm.full_tensor() if isinstance(norm, DTensor) else norm for norm in norms]
    total = torch.linalg.vector_norm(torch.stack(whole))
    for params in groups:
        clip_grads_with_norm_(params, max_norm, total)


def main() -> None:
    one_thread()
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    work = Work(sys.argv[1])
    vocabulary = "--vocabulary" in sys.argv
    model = work.build()
    mesh = init_device_mesh("cpu", (world,))
    for block in model.layers[1:-1]:
        parallelize_module(block, mesh, {name: style() for name, style in BLOCK.items()})
    if vocabulary:
        parallelize_module(model.layers[0], mesh, {"tokens": RowwiseParallel(input_layouts=Replicate())})
        parallelize_module(model.layers[-1], mesh, {"output": ColwiseParallel(use_local_output=False)})
    params = list(model.parameters())
    kinds = [[p for p in params if isinstance(p, DTensor) is cut] for cut in (True, False)]
    optimizers = [work.optimizer(kind) for kind in kinds]
    record = Record(sys.argv[2], rank)
    for step in range(1, work.steps + 1):
        losses = []
        for micro in range(work.micro_batches):
            inputs, targets = work.micro_batch(step, micro)
            with loss_parallel() if vocabulary else nullcontext():
                loss = mean_loss(model(inputs), targets)
                (loss / work.micro_batches).backward()
            losses.append(loss.full_tensor() if isinstance(loss, DTensor) else loss)
        clip(kinds, work.grad_clip)
        for optimizer in optimizers:
            work.set_rate(optimizer, step)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        record(step, losses if rank == 0 else [])
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
