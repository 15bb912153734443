"""Peer: DDP with torch's ZeroRedundancyOptimizer (ZeRO-1) under torchrun. Arguments: work.yaml, output folder."""

import sys

import torch.distributed as dist
from common import ADAMW, Record, Work, one_thread
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel
from torch.optim import AdamW
from train_ddp import train


def main() -> None:
    one_thread()
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    work = Work(sys.argv[1])
    ddp = DistributedDataParallel(work.build(), gradient_as_bucket_view=True)
    # One broadcast per owner instead of one per parameter. (overlap_with_ddp takes only one group of parameters, so no
    # weights without decay, and does without clipping.)
    groups = work.groups(ddp.parameters())
    optimizer = ZeroRedundancyOptimizer(groups, AdamW, parameters_as_bucket_view=True, **ADAMW)
    train(work, ddp, rank, world, Record(sys.argv[2], rank), optimizer)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
