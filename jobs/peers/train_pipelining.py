"""Peer: torch.distributed.pipelining's 1F1B under torchrun, a stage a process. Arguments: work.yaml, output folder."""

import sys

import torch
import torch.distributed as dist
from common import Record, Work, mean_loss, one_thread
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B
from torch.nn.utils import clip_grads_with_norm_, get_total_norm


def cut(layers: nn.ModuleList, stages: int, stage: int) -> nn.Sequential:
    """As ours: blocks in equal numbers, the embedding with the first of them, the head with the last."""
    blocks = len(layers) - 2
    bounds = [1 + blocks * i // stages for i in range(stages + 1)]
    bounds[0], bounds[-1] = 0, len(layers)
    return nn.Sequential(*layers[bounds[stage] : bounds[stage + 1]])


def clip(params: list[nn.Parameter], max_norm: float) -> None:
    """By the norm over all stages."""
    squares = get_total_norm([p.grad for p in params if p.grad is not None]).square()
    dist.all_reduce(squares)
    clip_grads_with_norm_(params, max_norm, squares.sqrt())


def batch(work: Work, step: int, part: int) -> Tensor:
    """Inputs (part 0) or targets (part 1) of the whole global batch; the schedule cuts it into micro-batches again."""
    return torch.cat([work.micro_batch(step, micro)[part] for micro in range(work.micro_batches)])


def main() -> None:
    one_thread()
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    work = Work(sys.argv[1])
    module = cut(work.build().layers, world, rank)
    params = list(module.parameters())
    optimizer = work.optimizer(params)
    stage = PipelineStage(module, rank, world, torch.device("cpu"))
    schedule = Schedule1F1B(stage, n_microbatches=work.micro_batches, loss_fn=mean_loss, scale_grads=True)
    record = Record(sys.argv[2], rank)
    for step in range(1, work.steps + 1):
        losses: list[Tensor] = []
        if rank == 0:
            schedule.step(batch(work, step, 0))
        elif rank == world - 1:
            schedule.step(target=batch(work, step, 1), losses=losses)
        else:
            schedule.step()
        clip(params, work.grad_clip)
        work.set_rate(optimizer, step)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        record(step, losses)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
