"""Layers of the user's own that a stage may begin or end with: cut anywhere, they train as they do in one piece."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest
import torch
from tiny import VOCAB, Tiny
from torch import Tensor, nn

from evenkeel.control.policy import Policy
from evenkeel.engine.local import LocalRun
from evenkeel.engine.model import LayerSpec, Model, model_shape
from evenkeel.plan.layout import Wish


class Shifted(nn.Module):
    """Token ids in, token ids out: no parameters, and nothing that has a gradient."""

    def forward(self, x: Tensor) -> Tensor:
        return (x + 1) % VOCAB


class Wide(nn.Module):
    """Gives float32 whatever it gets, as many norms do."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(12))

    def forward(self, x: Tensor) -> Tensor:
        return x.float() * self.weight.float()


class Narrow(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.to(self.weight.dtype))


class OneHot(nn.Module):
    """A first layer without parameters, whose output nobody wants the gradient of."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.one_hot(x, VOCAB).to(torch.get_default_dtype()).to(self.kind.dtype)

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("kind", torch.zeros(()), persistent=False)


EMBED = partial(nn.Embedding, VOCAB, 12)
MODELS: dict[str, Sequence[Callable[[], nn.Module]]] = {
    "whole numbers between stages": (Shifted, EMBED, partial(nn.Linear, 12, VOCAB)),
    "no parameters in the first stage": (OneHot, partial(nn.Linear, VOCAB, 12), partial(nn.Linear, 12, VOCAB)),
    "another type between stages": (EMBED, Wide, partial(Narrow, 12, VOCAB)),
}


@dataclass(frozen=True)
class Odd(Tiny):
    name: str = ""

    def model(self) -> Model:
        layers = tuple(LayerSpec(f"layer{i}", build) for i, build in enumerate(MODELS[self.name]))
        return Model(layers, loss=super().model().loss)


def trained(folder: Path, name: str, stages: int, precision: str) -> dict[str, Tensor]:
    folder.mkdir()
    job = Odd(folder, precision=precision, steps=4, name=name)
    wish = Wish(data=1, pipeline=stages, tensor=1, min_workers=stages, max_workers=stages)
    outcome = LocalRun(job, Policy(model_shape(job.model()), wish, 4, job.steps)).run()
    assert (outcome.status, outcome.error) == ("finished", "")
    assert all(line.vote.loss is not None for line in outcome.metrics)
    return job.final()


@pytest.mark.parametrize("precision", ["fp64", "bf16"])
@pytest.mark.parametrize("name", MODELS)
def test_each_layer_may_be_a_stage(name: str, precision: str, tmp_path: Path) -> None:
    whole = trained(tmp_path / "whole", name, 1, precision)
    cut = trained(tmp_path / "cut", name, 3, precision)
    assert all(torch.equal(cut[key], value) for key, value in whole.items())
