"""Peer: DistributedDataParallel under torchrun, with gradient accumulation. Arguments: work.yaml, output folder."""

import sys
from collections.abc import Callable
from contextlib import nullcontext

import torch.distributed as dist
from common import Record, Work, mean_loss, one_thread
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grad_norm_
from torch.optim import Optimizer


def train(
    work: Work,
    ddp: DistributedDataParallel,
    rank: int,
    world: int,
    record: Record,
    optimizer: Optimizer | None = None,
    save: Callable[[int, Optimizer], None] | None = None,
) -> None:
    """The training loop of all peers that are data-parallel.

    Args:
        optimizer: in place of AdamW, with the groups of parameters of work.groups.
        save: called after a step that is followed by a checkpoint.
    """
    params = list(ddp.parameters())
    optimizer = optimizer or work.optimizer(params)
    mine = work.share(rank, world)
    for step in range(1, work.steps + 1):
        losses = []
        for micro in mine:
            inputs, targets = work.micro_batch(step, micro)
            with nullcontext() if micro == mine[-1] else ddp.no_sync():
                loss = mean_loss(ddp(inputs), targets)
                (loss / len(mine)).backward()
            losses.append(loss.detach())
        clip_grad_norm_(params, work.grad_clip)
        work.set_rate(optimizer, step)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        record(step, losses)
        if save is not None and step % work.save_every == 0:
            save(step, optimizer)


def begin(file: str) -> tuple[Work, DistributedDataParallel, int, int]:
    """What every such peer begins with: the work, its model, this process's rank, and how many there are."""
    one_thread()
    dist.init_process_group("gloo")
    work = Work(file)
    ddp = DistributedDataParallel(work.build(), gradient_as_bucket_view=True)
    return work, ddp, dist.get_rank(), dist.get_world_size()


def main() -> None:
    work, ddp, rank, world = begin(sys.argv[1])
    train(work, ddp, rank, world, Record(sys.argv[2], rank))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
