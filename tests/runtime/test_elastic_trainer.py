"""The Python side: a model of one's own, Ray's own configuration classes, and a ray.train.Result."""

import io
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
from ray import cloudpickle
from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig, TrainingFailedError
from ray_runs import ONE, merged
from torch import nn

from evenkeel.config import ConfigError
from evenkeel.engine.model import LayerSpec, Model
from evenkeel.runtime.names import NAMESPACE
from evenkeel.trainer import ElasticTrainer

WIDTH = 16


class Bytes(nn.Module):
    """Bytes to vectors."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(256, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.table(x)


class Guess(nn.Module):
    """Vectors to the next byte."""

    def __init__(self) -> None:
        super().__init__()
        self.out = nn.Linear(WIDTH, 256)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(x)


def bigrams(config: Any) -> Model:
    return Model(layers=(LayerSpec("bytes", Bytes), LayerSpec("guess", Guess)))


@pytest.fixture
def config(tmp_path: Path) -> dict[str, Any]:
    (tmp_path / "text.txt").write_bytes(bytes(range(32, 127)) * 100)
    data = {"path": str(tmp_path / "text.txt"), "seq_len": 16}
    return merged({"model": {"name": "decoder"}, "data": data})


def test_fit(tmp_path: Path, config: dict[str, Any], shared_ray: str) -> None:
    cloudpickle.register_pickle_by_value(sys.modules[__name__])  # as a script's own functions are
    config["model"] = {}
    shown = io.StringIO()
    trainer = ElasticTrainer(
        config,
        model=bigrams,
        scaling_config=ScalingConfig(num_workers=2),
        run_config=RunConfig(name="own", storage_path=str(tmp_path / "runs")),
        out=shown,
    )
    result = trainer.fit()
    assert result.error is None
    assert result.metrics is not None
    assert result.metrics["step"] == 8
    assert result.path == str(tmp_path / "runs" / "own")
    assert os.path.exists(os.path.join(result.path, "final", "model.safetensors"))
    assert "own finished" in shown.getvalue()


class Boom(Guess):
    """Fails where gradients are wanted."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.requires_grad:
            raise ValueError("boom")
        return super().forward(x)


def booms(config: Any) -> Model:
    return Model(layers=(LayerSpec("bytes", Bytes), LayerSpec("boom", Boom)))


def test_a_failed_training_raises_also_in_a_thread(tmp_path: Path, config: dict[str, Any], shared_ray: str) -> None:
    cloudpickle.register_pickle_by_value(sys.modules[__name__])
    own = {"model": {}, "run": {"name": "boom", "storage_path": str(tmp_path / "runs")}}
    values = {**config, **merged(ONE), "data": config["data"], **own}
    trainer = ElasticTrainer(values, model=booms, out=io.StringIO())
    with ThreadPoolExecutor(1) as pool, pytest.raises(TrainingFailedError, match="ValueError: boom") as raised:
        pool.submit(trainer.fit).result()
    result = raised.value.result  # type: ignore[attr-defined]
    assert (result.error, result.metrics, result.path) == (raised.value, None, str(tmp_path / "runs" / "boom"))
    assert [e for e in ray.util.list_named_actors(all_namespaces=True) if e["namespace"] == NAMESPACE] == []


def test_ray_configurations_mean_the_same_here(tmp_path: Path, config: dict[str, Any]) -> None:
    scaling = ScalingConfig(num_workers=(2, 5), use_gpu=True, resources_per_worker={"CPU": 2, "GPU": 1})
    run = RunConfig(
        name="n",
        storage_path=str(tmp_path),
        failure_config=FailureConfig(max_failures=3),
        checkpoint_config=CheckpointConfig(num_to_keep=4),
    )
    made = ElasticTrainer(config, scaling_config=scaling, run_config=run).config
    assert (made.scaling.workers, made.scaling.use_gpu) == ([2, 5], True)
    assert made.scaling.resources_per_worker == {"CPU": 2.0, "GPU": 1.0}
    assert (made.run.name, made.run.storage_path) == ("n", str(tmp_path))
    assert (made.checkpoint.max_failures, made.checkpoint.keep) == (3, 4)
    assert made.train.steps == 8
    again = ElasticTrainer(made, scaling_config=ScalingConfig(num_workers=3)).config
    assert again.scaling.workers == [3, 3]
    assert again.run.name == "n"


def test_what_has_no_meaning_here_is_refused(config: dict[str, Any]) -> None:
    config["run"] = {"name": "n"}
    with pytest.raises(ConfigError, match=r"scaling_config\.accelerator_type: is 'H100'; evenkeel takes only"):
        ElasticTrainer(config, scaling_config=ScalingConfig(num_workers=1, accelerator_type="H100"))
    with pytest.raises(ConfigError, match=r"run\.name"):
        ElasticTrainer({**config, "run": {"name": "a/b"}})
