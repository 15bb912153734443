"""The decoder against a naive one, its shape without memory, and what it says of bad configurations."""

import math
import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

from evenkeel.config_values import ConfigError
from evenkeel.engine.model import Stage, boundaries_of, model_shape, whole_model
from evenkeel.models.registry import load_model

CONFIG = {"vocab_size": 40, "d_model": 32, "layers": 2, "heads": 8, "kv_heads": 2, "d_ff": 48, "seq_len": 16}


def naive_norm(x: Tensor, weight: Tensor, eps: float = 1e-5) -> Tensor:
    return x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt() * weight


def naive_rotation(x: Tensor, theta: float = 10000.0) -> Tensor:
    """(seq, width): pair i turned by position / theta**(2i / width), as complex numbers."""
    seq, width = x.shape
    turned = torch.empty_like(x)
    for position in range(seq):
        for i in range(width // 2):
            angle = position * theta ** (-2 * i / width)
            pair = complex(x[position, i], x[position, i + width // 2]) * complex(math.cos(angle), math.sin(angle))
            turned[position, i], turned[position, i + width // 2] = pair.real, pair.imag
    return turned


def naive_attention(x: Tensor, p: dict[str, Tensor], heads: int, kv_heads: int) -> Tensor:
    """(seq, d_model), head by head with an explicit mask; each key-value head serves heads / kv_heads queries."""
    seq, d_model = x.shape
    width = d_model // heads
    q, k, v = (x @ p[f"{name}.weight"].T for name in ("query", "key", "value"))
    outputs = []
    for head in range(heads):
        shared = head // (heads // kv_heads)
        qh = naive_rotation(q[:, head * width : (head + 1) * width])
        kh = naive_rotation(k[:, shared * width : (shared + 1) * width])
        scores = qh @ kh.T / math.sqrt(width)
        scores = scores.masked_fill(torch.ones(seq, seq).triu(1).bool(), float("-inf"))
        outputs.append(scores.softmax(-1) @ v[:, shared * width : (shared + 1) * width])
    return torch.cat(outputs, -1) @ p["output.weight"].T


def naive_decoder(ids: Tensor, stage: Stage, heads: int, kv_heads: int) -> Tensor:
    p = {name: parameter.detach() for name, parameter in stage.named()}

    def below(prefix: str) -> dict[str, Tensor]:
        return {name.removeprefix(prefix): value for name, value in p.items() if name.startswith(prefix)}

    x = p["embed.tokens.weight"][ids]
    for i in range(2):
        block = f"blocks.{i}."
        normed = naive_norm(x, p[f"{block}attention_norm.weight"])
        x = x + naive_attention(normed, below(f"{block}attention."), heads, kv_heads)
        h = naive_norm(x, p[f"{block}feed_forward_norm.weight"])
        ff = below(f"{block}feed_forward.")
        gate = h @ ff["gate.weight"].T
        x = x + (gate * gate.sigmoid() * (h @ ff["up.weight"].T)) @ ff["down.weight"].T
    return naive_norm(x, p["head.norm.weight"]) @ p.get("head.output.weight", p["embed.tokens.weight"]).T


@pytest.mark.parametrize("kv_heads", [1, 2, 8])
@pytest.mark.parametrize("tie_embeddings", [False, True])
def test_is_what_the_naive_one_is(kv_heads: int, tie_embeddings: bool) -> None:
    model = load_model("decoder", {**CONFIG, "kv_heads": kv_heads, "tie_embeddings": tie_embeddings})
    stage = whole_model(model, seed=2, dtype=torch.float64)
    with torch.no_grad():
        for _, parameter in stage.named():
            parameter.mul_(5.0)  # so that scores differ enough for a wrong order of heads to show
    ids = torch.randint(0, 40, (2, 9))
    logits = stage(ids).detach()
    for row in range(2):
        expected = naive_decoder(ids[row], stage, 8, kv_heads)
        torch.testing.assert_close(logits[row], expected, rtol=1e-9, atol=1e-9)


def test_gradients_are_the_derivatives() -> None:
    model = load_model("decoder", {**CONFIG, "layers": 1})
    stage = whole_model(model, seed=2, dtype=torch.float64)
    block = stage.layers[1]
    x = torch.randn(1, 5, 32, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(block, (x,))


def test_shape_without_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    model = load_model("decoder", {**CONFIG, "tie_embeddings": True})
    shape = model_shape(model)
    assert [layer.name for layer in shape.layers] == ["embed", "blocks.0", "blocks.1", "head"]
    assert shape.depth == 4 and shape.tensor_divides == 2
    assert shape.tied() == ("embed.tokens.weight",)
    assert shape.param("blocks.1.attention.output.weight").split == 1
    assert shape.param("blocks.1.attention.key.weight").split == 0
    assert shape.param("head.norm.weight").split is None
    stage = whole_model(model, seed=0)
    assert {p.name: p.shape for p in shape.params(0, 4)} == {name: tuple(p.shape) for name, p in stage.named()}
    inputs = torch.zeros(3, 16, dtype=torch.int64)
    expected = ((3, 16), (3, 16, 32), (3, 16, 32), (3, 16, 32))
    assert tuple(h.shape for h in boundaries_of(model, inputs, torch.bfloat16)) == expected
    monkeypatch.setattr("evenkeel.engine.model._CHEAP", 0.0)
    assert tuple(h.shape for h in boundaries_of(model, inputs, torch.bfloat16)) == expected


def test_torchs_compiler_stays_out_of_the_way() -> None:
    # Importing it takes each process 1 to 3 s.
    code = """
import sys, torch
from evenkeel.core.model import Shard
from evenkeel.engine.model import boundaries_of, model_shape
from evenkeel.engine.optimizer import AdamW
from evenkeel.engine.state import ShardState
from evenkeel.models.registry import load_model
model = load_model("decoder", {"layers": 1, "d_model": 32})
shape, ids = model_shape(model), torch.zeros(1, 8, dtype=torch.int64)
for precision, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp64", torch.float64)):
    boundaries_of(model, ids, dtype)
    ShardState(model, shape, Shard(0, 3, 1, 2), precision).initialise(0)
    state = ShardState(model, shape, Shard(0, 3, 0, 1), precision)
    state.initialise(0)
    model.loss(state.stage(ids), ids, None)[0].backward()
    AdamW(state).step(1, 1e-3, 8.0)
assert not {"torch._dynamo", "sympy"} & sys.modules.keys()
"""
    subprocess.run(
        [sys.executable, "-c", code], check=True, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    )


def test_the_default_has_about_three_million_parameters() -> None:
    shape = model_shape(load_model("decoder", {}))
    assert sum(math.prod(p.shape) for p in shape.params(0, shape.depth)) == 3_082_496


def test_dropout_is_planned_only_where_there_is_any() -> None:
    assert not any("dropout" in pattern for pattern in load_model("decoder", CONFIG).tp_plan)
    assert model_shape(load_model("decoder", {**CONFIG, "dropout": 0.1})).depth == 4


@pytest.mark.parametrize(
    ("options", "key", "words"),
    [
        ({"heads": 3}, "model.heads", "3 do not divide d_model 32"),
        ({"kv_heads": 3}, "model.kv_heads", "3 do not divide heads 8"),
        ({"heads": 32, "kv_heads": 32}, "model.heads", "even width"),
        ({"layers": 0}, "model.layers", "at least 1"),
        ({"dropout": 1.0}, "model.dropout", "0 <= dropout < 1"),
        ({"rope_theta": 0.0}, "model.rope_theta", "above 0"),
        ({"d_model": "wide"}, "model.d_model", "whole number"),
        ({"head": 8}, "model.head", "nearest valid key: model.heads"),
    ],
)
def test_bad_configurations_name_the_key(options: dict[str, Any], key: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words) as caught:
        load_model("decoder", {**CONFIG, **options})
    assert caught.value.key == key
