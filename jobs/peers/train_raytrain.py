"""Peer: Ray Train's TorchTrainer with DDP, on a local Ray of its own. Arguments: work.yaml, output folder."""

import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any


def train_on_worker(config: dict[str, Any]) -> None:
    import ray.train
    from common import Record, Work, one_thread
    from ray.train.torch import prepare_model
    from train_ddp import train

    one_thread()
    context = ray.train.get_context()
    rank, world = context.get_world_rank(), context.get_world_size()
    work = Work(config["work"])
    options = {"gradient_as_bucket_view": True}
    train(work, prepare_model(work.build(), parallel_strategy_kwargs=options), rank, world, Record(config["out"], rank))


def fit(loop: Callable[[dict[str, Any]], None], work: str, out: str) -> None:
    """Runs the loop on the workers of the work's configuration; checkpoints go to the folder `saved`."""
    import json

    import ray
    from ray.train import CheckpointConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    work, out = (str(Path(argument).resolve()) for argument in (work, out))
    workers = json.loads(Path(work).read_text())["scaling"]["workers"][1]
    with tempfile.TemporaryDirectory(prefix="peer-", dir="/tmp") as temp:
        # As ours starts its local Ray: no dashboard, the smallest object store.
        ray.init(
            address="local",
            num_cpus=workers,
            include_dashboard=False,
            object_store_memory=80 * 2**20,
            log_to_driver=False,
            _temp_dir=temp,
        )
        trainer = TorchTrainer(
            loop,
            train_loop_config={"work": work, "out": out},
            torch_config=TorchConfig(backend="gloo"),
            scaling_config=ScalingConfig(num_workers=workers, resources_per_worker={"CPU": 1}),
            run_config=RunConfig(
                name="peer", storage_path=str(Path(out) / "saved"), checkpoint_config=CheckpointConfig(num_to_keep=1)
            ),
        )
        try:
            trainer.fit()
        finally:
            ray.shutdown()


if __name__ == "__main__":
    fit(train_on_worker, *sys.argv[1:])
