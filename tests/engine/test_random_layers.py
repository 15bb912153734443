"""Models of the user's own that draw random numbers as PyTorch users do: the same run for whoever computes it."""

from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from tiny import SEQ, VOCAB, Tiny, difference
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from evenkeel.control.policy import Policy
from evenkeel.engine.faults import FaultPlan
from evenkeel.engine.local import LocalRun, Outcome
from evenkeel.engine.model import LayerSpec, Model, build_stage, model_shape, whole_model
from evenkeel.engine.random import KeyedDropout, RandomKey, bind_random
from evenkeel.plan.layout import Wish

WIDTH, STEPS = 8, 6


class Embed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCAB, WIDTH)
        self.positions = nn.Parameter(torch.randn(SEQ, WIDTH) * 0.02)
        self.register_buffer("features", torch.randn(WIDTH), persistent=False)
        self.dropout = nn.Dropout(0.2)

    def forward(self, ids: Tensor) -> Tensor:
        x: Tensor = self.dropout((self.tokens(ids) + self.positions) * self.features)
        return x


class Block(nn.Module):
    """One dropout used twice, and three layers that draw from torch's own generator."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, 2, dropout=0.2, batch_first=True)
        self.dropout = nn.Dropout(0.2)
        self.norm = nn.LayerNorm(WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 16), nn.RReLU(), nn.Dropout(0.1), nn.Linear(16, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        x = x + self.dropout(self.attention(y, y, y, need_weights=False)[0])
        x = x + self.dropout(self.mlp(x))
        out: Tensor = x + 0.01 * torch.randn_like(x) if self.training else x
        return F.dropout(out, 0.1, self.training)


class OwnRandom(Tiny):
    def model(self) -> Model:
        head = LayerSpec("head", partial(nn.Linear, WIDTH, VOCAB))
        return Model((LayerSpec("embed", Embed), LayerSpec("block", Block), LayerSpec("drop", Drop), head))


Drop = partial(nn.Dropout, 0.2)


def run(job: Tiny, data: int, pipeline: int, spares: int = 0) -> Outcome:
    wish = Wish(data, pipeline, 1, 1, data * pipeline)
    outcome = LocalRun(job, Policy(model_shape(job.model()), wish, 4, job.steps, spares=spares)).run()
    assert (outcome.status, outcome.error) == ("finished", "")
    return outcome


def test_every_layout_is_the_same_run(tmp_path: Path) -> None:
    job = OwnRandom(tmp_path, steps=STEPS)
    losses, params = job.reference()
    for data, pipeline in ((1, 1), (2, 2)):
        outcome = run(job, data, pipeline)
        assert outcome.losses == pytest.approx(losses, rel=1e-10)
        assert difference(job.final(), params) < 1e-10


def test_a_kill_changes_no_bit(tmp_path: Path) -> None:
    (tmp_path / "quiet").mkdir()
    quiet = OwnRandom(tmp_path / "quiet", precision="fp32", steps=STEPS)
    undisturbed = run(quiet, 2, 2, spares=2)
    faults = (FaultPlan(0, 3, "backward", "rank:1", "kill"), FaultPlan(1, 5, "forward", "rank:0", "kill"))
    job = replace(quiet, folder=tmp_path, faults=faults)
    disturbed = run(job, 2, 2, spares=2)
    assert len(disturbed.named("worker_lost")) == 2
    assert disturbed.losses == undisturbed.losses
    params = job.final()
    assert all(torch.equal(params[name], value) for name, value in quiet.final().items())


def test_every_plain_dropout_is_keyed_wherever_it_is() -> None:
    shared = nn.Dropout(0.3)

    def build() -> nn.Module:
        return nn.ModuleDict({"a": shared, "b": shared, "c": nn.Sequential(nn.Dropout(0.1), nn.Dropout(1.0))})

    stage = build_stage(Model((LayerSpec("all", build), LayerSpec("one", Drop))), 0, 2)
    kinds = {path: module for path, module in stage.named_modules() if "ropout" in type(module).__name__}
    keyed = {path: module.p for path, module in kinds.items() if isinstance(module, KeyedDropout)}
    assert keyed == {"layers.0.a": 0.3, "layers.0.b": 0.3, "layers.0.c.0": 0.1, "layers.1": 0.2}
    assert type(kinds["layers.0.c.1"]) is nn.Dropout  # drops everything: nothing is drawn
    assert len({module.stream for module in kinds.values() if isinstance(module, KeyedDropout)}) == 4


class Checkpointed(nn.Module):
    def __init__(self, checkpointed: bool) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.checkpointed = checkpointed

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = checkpoint(self._inner, x, use_reentrant=False) if self.checkpointed else self._inner(x)
        return y

    def _inner(self, x: Tensor) -> Tensor:
        return F.dropout(self.linear(x), 0.5)


def test_activation_checkpointing_sees_the_same_masks_also_after_other_micro_batches() -> None:
    found = []
    for checkpointed in (False, True):
        stage, key = whole_model(Model((LayerSpec("only", partial(Checkpointed, checkpointed)),)), 1), RandomKey(1)
        bind_random(stage, key)
        losses = []
        for micro in range(3):
            key.at(1, micro)
            losses.append(stage(torch.ones(5, 4)).square().sum())
        sum(reversed(losses)).backward()  # type: ignore[union-attr]
        found.append([parameter.grad for parameter in stage.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
