"""Peer: Ray Train with DDP that reports checkpoints, uploaded asynchronously. Arguments: work.yaml, output folder.

Rank 0 writes it with torch.save to a folder of its own, which is the usual way, and Ray copies it to the storage path.
"""

import sys
import tempfile
from pathlib import Path
from typing import Any

from train_raytrain import fit


def train_on_worker(config: dict[str, Any]) -> None:
    import ray.train
    import torch
    from common import Record, Work, one_thread
    from ray.train import Checkpoint, CheckpointUploadMode
    from ray.train.torch import prepare_model
    from save_ddp import State, timed
    from train_ddp import train

    one_thread()
    context = ray.train.get_context()
    rank, world = context.get_world_rank(), context.get_world_size()
    work, out = Work(config["work"]), config["out"]
    ddp = prepare_model(work.build(), parallel_strategy_kwargs={"gradient_as_bucket_view": True})

    def save(step: int, state: State) -> None:
        if rank:
            ray.train.report({"step": step})
            return
        folder = tempfile.mkdtemp(dir=Path(out) / "saved")
        torch.save(state, Path(folder) / "state.pt")
        ray.train.report(
            {"step": step},
            checkpoint=Checkpoint.from_directory(folder),
            checkpoint_upload_mode=CheckpointUploadMode.ASYNC,
            delete_local_checkpoint_after_upload=True,
        )

    Path(out, "saved").mkdir(exist_ok=True)
    train(work, ddp, rank, world, Record(out, rank), save=timed(out, rank, ddp.module, save, lambda: None))


if __name__ == "__main__":
    fit(train_on_worker, *sys.argv[1:])
