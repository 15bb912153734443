"""Peer: DDP that makes checkpoints as it trains, under torchrun. Arguments: work.yaml, output folder, dcp or torch.

Each notes how long its training stands still for one; what it writes is in the folder `saved`.
"""

import json
import os
import sys
import time
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from common import Record
from torch import nn
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.optim import Optimizer
from train_ddp import begin, train

State = dict[str, Any]


def timed(
    folder: str, rank: int, model: nn.Module, save: Callable[[int, State], None], before: Callable[[], None]
) -> Callable[[int, Optimizer], None]:
    """For train_ddp.train: saves, and notes the seconds; those of `before` are not counted."""
    lines = os.open(Path(folder) / f"inside-{rank}.jsonl", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)

    def run(step: int, optimizer: Optimizer) -> None:
        before()
        began = time.perf_counter()
        save(step, {"model": model.state_dict(), "optimizer": optimizer.state_dict()})
        line = {"worker": str(rank), "step": step, "copy_s": time.perf_counter() - began}
        os.write(lines, (json.dumps(line) + "\n").encode())

    return run


class AsyncSave:
    """dcp.async_save, with a stager that keeps its buffers and a process group of its own, as it talks meanwhile."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._group = dist.new_group(backend="gloo")
        self._stager = DefaultStager(StagingOptions(False, False, False, False))
        self._written: Future[Any] | None = None

    def __call__(self, step: int, state: State) -> None:
        found = dcp.async_save(
            state, checkpoint_id=self._folder / str(step), process_group=self._group, async_stager=self._stager
        )
        assert isinstance(found, Future)
        self._written = found

    def wait(self) -> None:
        """Until the last one is written."""
        if self._written is not None:
            self._written.result()


class TorchSave:
    """torch.save on rank 0, without a sync; the others wait for it in their next sum of gradients."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def __call__(self, step: int, state: State) -> None:
        if dist.get_rank() == 0:
            torch.save(state, self._folder / f"{step}.tmp")
            (self._folder / f"{step}.tmp").rename(self._folder / f"{step}.pt")

    def wait(self) -> None:
        """Nothing is left to be done."""


SAVES = {"dcp": AsyncSave, "torch": TorchSave}


def main() -> None:
    work_file, out, how = sys.argv[1:]
    work, ddp, rank, world = begin(work_file)
    folder = Path(out) / "saved"
    folder.mkdir(exist_ok=True)
    save = SAVES[how](folder)
    train(work, ddp, rank, world, Record(out, rank), save=timed(out, rank, ddp.module, save, save.wait))
    save.wait()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
