"""Models and data of one's own, by "module:function", and what is said where they do not fit."""

import io
import sys
from pathlib import Path
from typing import Any

import pytest
from ray_runs import ONE, Site, merged

from evenkeel.config import Config, load_config
from evenkeel.runtime.prepare import prepare
from evenkeel.runtime.run import write_beginning
from evenkeel.trainer import run

CODE = """
import torch
from torch import nn
from evenkeel.data.dataset import Data, TensorDataset
from evenkeel.engine.model import LayerSpec, Model

class Rows(TensorDataset):
    def get(self, indices):
        inputs, targets = super().get(indices)
        return inputs.numpy(), targets

def model(config):
    return Model(layers=(LayerSpec("a", lambda: nn.Linear(4, 8)), LayerSpec("b", lambda: nn.Linear(8, 3))))

def data(config, kind=TensorDataset):
    inputs = torch.randn(64, 4, generator=torch.Generator().manual_seed(1))
    return Data(kind(inputs, (inputs[:, 0] > 0).long()), kind(inputs[:3], torch.zeros(3, dtype=torch.int64)))

def arrays(config):
    return data(config, Rows)
"""
OWN: dict[str, Any] = {"model": {"name": "train:model"}, "data": {"name": "train:data", "path": "none"}}


@pytest.fixture
def code(tmp_path: Path) -> Path:
    """A user's own train.py, in the working directory. It is called like the job."""
    (tmp_path / "train.py").write_text(CODE)
    return tmp_path


def test_a_job_finds_what_lies_in_the_working_directory(code: Path, site: Site) -> None:
    done = site.start({**OWN, **ONE}).finish()
    assert (done.status, done.err) == (0, "")
    assert done.steps == list(range(1, 9))


def config(folder: Path, changes: dict[str, Any]) -> Config:
    values = merged({**OWN, "run": {"name": "r", "storage_path": str(folder / "runs")}, **changes})
    values["model"] = {"name": values["model"]["name"]} if ":" in values["model"]["name"] else values["model"]
    return load_config([], values=values)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"data": {"name": "train:arrays"}}, "data.name: 'train:arrays' raised TypeError: a sample is made of torch.T"),
        ({"train": {"eval_every": 2, "micro_batch": 4}}, "train.eval_every: is 2, but there are 3 samples to validate"),
        (
            {"model": {"name": "decoder", "vocab_size": 257}, "parallel": {"tensor": 2, "data": 1}},
            "parallel.tensor: 2 does not divide 257, the width of embed.tokens.weight",
        ),
    ],
)
def test_what_does_not_fit_is_named(
    code: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    changes: dict[str, Any],
    says: str,
) -> None:
    monkeypatch.syspath_prepend(code)
    monkeypatch.delitem(sys.modules, "train", raising=False)
    assert run(config(code, changes), dry_run=True) == 2
    assert says in capsys.readouterr().err


def test_a_dry_run_looks_at_the_run_that_is_there(
    code: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(code)
    monkeypatch.delitem(sys.modules, "train", raising=False)
    write_beginning(prepare(config(code, {})), {}, None)
    assert run(config(code, {}), dry_run=True, out=io.StringIO()) == 0
    assert run(config(code, {"train": {"learning_rate": 0.5}}), dry_run=True) == 2
    assert "train.learning_rate: is 0.5, but the run in" in capsys.readouterr().err
    (code / "runs" / "r" / "run.json").unlink()
    (code / "file").touch()
    assert run(config(code, {"run": {"name": "r", "storage_path": str(code / "file")}}), dry_run=True) == 2
    assert "Not a directory" in capsys.readouterr().err
