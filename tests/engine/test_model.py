"""Models of the user's own: a function that returns layers; what cannot be trained is refused with its name."""

import os
import random
import resource
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import own_model
from evenkeel.config_values import ConfigError
from evenkeel.core.model import Shard
from evenkeel.data.dataset import TensorDataset
from evenkeel.engine.model import (
    LayerSpec,
    Model,
    boundaries_of,
    build_stage,
    cast_inputs,
    default_init,
    model_shape,
    whole_model,
)
from evenkeel.engine.optimizer import AdamW
from evenkeel.engine.random import RandomKey, bind_random
from evenkeel.engine.state import ShardState
from evenkeel.models.registry import load_model


def clusters() -> TensorDataset:
    """10 classes that an MLP can tell apart."""
    generator = torch.Generator().manual_seed(0)
    targets = torch.arange(200) % 10
    centres = torch.randn(10, 64, generator=generator)
    return TensorDataset(centres[targets] + 0.3 * torch.randn(200, 64, generator=generator), targets)


def test_a_model_of_ones_own_is_cut_into_stages_and_learns() -> None:
    model = load_model("own_model:build", {"widths": [48]})
    shape = model_shape(model)
    assert [layer.name for layer in shape.layers] == ["layer0", "layer1"]
    assert [layer.cost for layer in shape.layers] == [64 * 48, 480]
    assert shape.param("layer0.0.weight").shape == (48, 64) and shape.tensor_divides == 1
    data = clusters()
    inputs, targets = data.get(range(200))
    assert tuple(h.shape for h in boundaries_of(model, inputs, torch.float64)) == ((200, 64), (200, 48))
    states = [ShardState(model, shape, Shard(i, i + 1, 0, 1)) for i in range(2)]
    optimizers = [AdamW(state, weight_decay=0.0) for state in states]
    for state in states:
        state.initialise(0)
    losses = []
    for step in range(1, 41):
        loss, tokens = model.loss(states[1].stage(states[0].stage(inputs)), targets, None)
        assert tokens == 200
        for state in states:
            state.zero_grad()
        loss.backward()
        for optimizer in optimizers:
            optimizer.step(step, 1e-2, float(tokens))
        losses.append(loss.item() / 200)
    assert losses[0] > 2.2 and losses[-1] < 0.1


def test_a_plain_loop_needs_the_model_and_the_random_numbers_alone() -> None:
    model = load_model("decoder", {"vocab_size": 16, "d_model": 16, "layers": 1, "heads": 2, "dropout": 0.1})
    stage, key = whole_model(model, seed=1, dtype=torch.float64), RandomKey(1)
    bind_random(stage, key)
    optimizer = torch.optim.AdamW(stage.parameters(), lr=1e-2)
    ids = torch.arange(66).view(2, 33) % 16
    losses = []
    for step in range(1, 21):
        key.at(step, 0)
        loss, tokens = model.loss(stage(ids[:, :-1]), ids[:, 1:], None)
        (loss / tokens).backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append((loss / tokens).item())
    assert losses[-1] < 0.5 * losses[0]


def test_a_stage_has_its_layers_alone_and_no_memory() -> None:
    model = load_model("decoder", {})
    stage = build_stage(model, 2, 4)
    names = [name for name, _ in stage.named()]
    assert len(names) == 18 and all(name.startswith(("blocks.1.", "blocks.2.")) for name in names)
    assert all(parameter.is_meta for parameter in stage.parameters())


def test_features_are_cast_and_token_ids_are_not() -> None:
    assert cast_inputs(torch.ones(2), "cpu", torch.bfloat16).dtype == torch.bfloat16
    assert cast_inputs(torch.ones(2, dtype=torch.int64), "cpu", torch.bfloat16).dtype == torch.int64


class Untied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3, 2))


def frozen() -> nn.Module:
    return nn.Linear(2, 2).requires_grad_(False)


def linear() -> nn.Module:
    return nn.Linear(2, 2)


def nested() -> nn.Module:
    return nn.ModuleDict({"b": linear()})


@pytest.mark.parametrize(
    ("layers", "words"),
    [
        ((), "at least one layer"),
        ((LayerSpec("a", linear), LayerSpec("a", linear)), "two layers of the model are called 'a'"),
        ((LayerSpec("a", frozen),), r"a\..* does not require a gradient"),
        ((LayerSpec("a", linear, ties={"weight": "b.weight"}),), "ties 'weight' to 'b.weight', which is no parameter"),
        (
            (LayerSpec("a", linear), LayerSpec("b", Untied, ties={"weight": "a.weight"})),
            r"shape=\(2, 2\).*not.*\(3, 2\)",
        ),
        ((LayerSpec("a", linear), LayerSpec("b", linear, ties={"scale": "a.bias"})), "has no such parameter"),
        ((LayerSpec("a", nested), LayerSpec("a.b", linear)), "two parameters of the model are called 'a.b.weight'"),
    ],
)
def test_what_cannot_be_trained_is_refused_by_name(layers: tuple[LayerSpec, ...], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        model_shape(Model(layers))


def test_a_parameter_that_a_layer_itself_shares_is_one() -> None:
    def build() -> nn.Module:
        layer = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False))
        layer[1].weight = layer[0].weight
        return layer

    model = Model((LayerSpec("twice", build),))
    shape = model_shape(model)
    assert [param.name for param in shape.params(0, 1)] == ["twice.0.weight"]
    state = ShardState(model, shape, Shard(0, 1, 0, 1))
    state.initialise(0)
    first, second = state.stage.layers[0]
    assert first.weight is second.weight
    state.stage(torch.ones(1, 3)).sum().backward()
    assert state.grad("twice.0.weight").abs().sum() > 0


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("gpt5", "'gpt5' is not known; expected one of decoder"),
        ("no_such_module:build", "cannot import 'no_such_module'"),
        ("own_model:missing", "module 'own_model' has no function 'missing'"),
        ("own_model:not_a_model", "returned dict"),
    ],
)
def test_a_model_that_cannot_be_found_names_the_key(name: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words) as caught:
        load_model(name, {})
    assert caught.value.key == "model.name"


def test_what_a_users_function_raises_comes_through(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(config: object) -> Model:
        raise ZeroDivisionError("of the user's own")

    monkeypatch.setattr(own_model, "build", broken)
    with pytest.raises(ZeroDivisionError, match="of the user's own"):
        load_model("own_model:build", {})


class Marked(nn.Module):
    """Initial values of many kinds, as its author wants them."""

    def __init__(self) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((4,), 1e-4))
        self.shift = nn.Parameter(torch.zeros(4))
        self.scale = nn.Parameter(torch.randn(4) * 0.5)
        self.linear = nn.Linear(4, 4)
        nn.init.eye_(self.linear.weight)
        self.drawn = nn.Parameter(torch.tensor(np.random.rand(4) + random.random()))
        self.register_buffer("table", torch.rand(4), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.gamma * self.linear(x) + self.shift + self.scale + self.drawn * self.table
        return y


def marked_model(**options: Any) -> Model:
    return Model((LayerSpec("a", linear4), LayerSpec("b", Marked), LayerSpec("c", Marked)), **options)


def linear4() -> nn.Module:
    return nn.Linear(4, 4)


def initialised(model: Model, start: int, stop: int, seed: int) -> ShardState:
    state = ShardState(model, model_shape(model), Shard(start, stop, 0, 1), seed=seed)
    state.initialise(seed)
    return state


def test_initial_values_are_the_modules_own_and_the_same_in_every_layout() -> None:
    model = marked_model()
    whole, end = initialised(model, 0, 3, 5), initialised(model, 2, 3, 5)
    value = {name: whole.tensor(f"param/{name}") for name in whole.boxes}
    assert torch.equal(value["b.gamma"], torch.full((4,), 1e-4)) and torch.equal(value["b.shift"], torch.zeros(4))
    assert torch.equal(value["b.linear.weight"], torch.eye(4))
    assert not torch.equal(value["b.scale"], value["c.scale"])
    assert 0 < value["a.weight"].abs().max() <= 0.5  # as nn.Linear has it: uniform within 1 / sqrt(4)
    assert all(torch.equal(end.tensor(f"param/{name}"), value[name]) for name in end.boxes)
    assert torch.equal(end.stage.layers[0].table, whole.stage.layers[2].table)
    plain = whole_model(model, 5)
    assert all(torch.equal(parameter, value[name]) for name, parameter in plain.named())
    assert torch.equal(plain.layers[2].table, end.stage.layers[0].table)
    other = initialised(model, 0, 3, 6)
    assert not torch.equal(other.tensor("param/b.scale"), value["b.scale"])
    assert not torch.equal(other.tensor("param/b.drawn"), value["b.drawn"])
    assert not torch.equal(other.stage.layers[2].table, end.stage.layers[0].table)


def test_an_explicit_init_has_the_last_word() -> None:
    state = initialised(marked_model(init=default_init), 0, 3, 5)
    assert torch.equal(state.tensor("param/b.gamma"), torch.ones(4))
    assert not torch.equal(state.tensor("param/b.linear.weight"), torch.eye(4))


def test_tied_parameters_begin_as_their_first_layer_has_them() -> None:
    model = Model((LayerSpec("in", embedding), LayerSpec("out", linear_to_8, ties={"weight": "in.weight"})))
    first, last = initialised(model, 0, 1, 5), initialised(model, 1, 2, 5)
    assert torch.equal(first.tensor("param/in.weight"), last.tensor("param/in.weight"))
    assert first.tensor("param/in.weight").std() > 0.5  # an nn.Embedding's, not an nn.Linear's


def embedding() -> nn.Module:
    return nn.Embedding(8, 4)


def linear_to_8() -> nn.Module:
    return nn.Linear(4, 8, bias=False)


def test_making_layers_leaves_the_global_generators_alone() -> None:
    torch.manual_seed(3), np.random.seed(3), random.seed(3)
    expected = torch.rand(1), np.random.rand(), random.random()
    torch.manual_seed(3), np.random.seed(3), random.seed(3)
    initialised(marked_model(), 0, 3, 5)
    assert (torch.rand(1), np.random.rand(), random.random()) == expected


def test_torchs_compiler_stays_out_of_the_way_of_a_model_of_ones_own() -> None:
    # Importing it takes each process 2 to 5 s.
    code = """
import sys, torch
from test_model import initialised, marked_model
from evenkeel.engine.model import boundaries_of
boundaries_of(marked_model(), torch.zeros(2, 4), torch.float32)
state = initialised(marked_model(), 0, 3, 0)
state.stage(torch.ones(2, 4)).sum().backward()
assert not {"torch._dynamo", "sympy"} & sys.modules.keys()
"""
    paths = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "PYTHONPATH": paths})


def test_layers_made_for_their_shapes_take_no_memory() -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    model_shape(Model((LayerSpec("large", partial(nn.Linear, 2**14, 2**14)),)))  # 1 GiB
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**17  # KiB
