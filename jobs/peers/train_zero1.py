"""Peer: DDP with torch's ZeroRedundancyOptimizer (ZeRO-1) under torchrun. Arguments: work.yaml, output folder."""

import sys

import torch.distributed as dist
from common import ADAMW, Record
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.optim import AdamW
from train_ddp import begin, train


def main() -> None:
    work, ddp, rank, world = begin(sys.argv[1])
    # One broadcast per owner instead of one per parameter. (overlap_with_ddp takes only one group of parameters, so no
    # weights without decay, and does without clipping.)
    groups = work.groups(ddp.parameters())
    optimizer = ZeroRedundancyOptimizer(groups, AdamW, parameters_as_bucket_view=True, **ADAMW)
    train(work, ddp, rank, world, Record(sys.argv[2], rank), optimizer)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
