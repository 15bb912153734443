"""The decoder's layers: an embedding, blocks of attention and feed-forward, and a head.

Every module takes its widths from the tensors it gets, so that the same code runs on a tensor-parallel cut.
"""

from collections.abc import Mapping
from functools import lru_cache, partial
from math import gcd
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from evenkeel.engine.model import LayerSpec, Model, default_init
from evenkeel.engine.random import KeyedDropout
from evenkeel.models.decoder.config import DecoderConfig, read_config
from evenkeel.models.decoder.plan import PLAN


def build(config: Mapping[str, Any]) -> Model:
    """The decoder of the configuration's section `model`: depth = layers + 2.

    Raises:
        ConfigError: naming the key.
    """
    c = read_config(config)
    blocks = tuple(LayerSpec(f"blocks.{i}", partial(Block, c), cost=1.0) for i in range(c.layers))
    ties = {"output.weight": "embed.tokens.weight"} if c.tie_embeddings else {}
    return Model(
        layers=(
            LayerSpec("embed", partial(Embed, c), cost=0.02),
            *blocks,
            LayerSpec("head", partial(Head, c), cost=head_cost(c), ties=ties),
        ),
        tp_plan={k: v for k, v in PLAN.items() if c.dropout > 0 or not k.endswith("dropout")},
        tensor_divides=gcd(c.heads, c.key_value_heads),
        init=partial(init, c),
        vocab_parallel=True,
        data_options={"seq_len": c.seq_len},
        vocab_size=c.vocab_size,
    )


def init(config: DecoderConfig, name: str, tensor: Tensor, generator: torch.Generator) -> None:
    """Like GPT-2: projections into the residual stream are scaled down by the square root of their number."""
    default_init(name, tensor, generator)
    if name.endswith(("attention.output.weight", "feed_forward.down.weight")):
        tensor.mul_((2 * config.layers) ** -0.5)


def head_cost(config: DecoderConfig) -> float:
    """Operations of the head relative to a block's, per token: 2 per weight, and attention over half the positions."""
    query, key_value = config.d_model, 2 * config.key_value_heads * config.head_width
    weights = config.d_model * (2 * query + key_value) + 3 * config.d_model * config.inner_width
    return config.vocab_size * config.d_model / (weights + config.seq_len * config.d_model)


class Embed(nn.Module):
    """(micro_batch, seq) token ids to (micro_batch, seq, d_model)."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.tokens = nn.Embedding(config.vocab_size, config.d_model)
        self.dropout = _dropout(config)

    def forward(self, ids: Tensor) -> Tensor:
        x: Tensor = self.dropout(self.tokens(ids))
        return x


class Block(nn.Module):
    """(micro_batch, seq, d_model) to the same."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(config.d_model, eps=config.norm_eps)
        self.attention = Attention(config)
        self.dropout = _dropout(config)
        self.feed_forward_norm = nn.RMSNorm(config.d_model, eps=config.norm_eps)
        self.feed_forward = FeedForward(config)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.dropout(self.attention(self.attention_norm(x)))
        out: Tensor = x + self.feed_forward(self.feed_forward_norm(x))
        return out


class Attention(nn.Module):
    """Causal attention; each head of keys and values serves a group of query heads."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.head_width = config.head_width
        self.theta = config.rope_theta
        key_value = config.key_value_heads * config.head_width
        self.query = nn.Linear(config.d_model, config.d_model, bias=False)
        self.key = nn.Linear(config.d_model, key_value, bias=False)
        self.value = nn.Linear(config.d_model, key_value, bias=False)
        self.output = nn.Linear(config.d_model, config.d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        batch, seq, _ = x.shape
        heads = (batch, seq, -1, self.head_width)
        cos, sin = rotary_table(seq, self.head_width, self.theta, x.dtype, x.device)
        q = rotate(self.query(x).view(heads), cos, sin).transpose(1, 2)  # (micro_batch, heads, seq, head_width)
        k = rotate(self.key(x).view(heads), cos, sin).transpose(1, 2)
        v = self.value(x).view(heads).transpose(1, 2)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])
        out: Tensor = self.output(y.transpose(1, 2).reshape(batch, seq, -1))
        return out


class FeedForward(nn.Module):
    """SwiGLU. Dropout is on the inner features, which tensor parallelism cuts."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.gate = nn.Linear(config.d_model, config.inner_width, bias=False)
        self.up = nn.Linear(config.d_model, config.inner_width, bias=False)
        self.dropout = _dropout(config)
        self.down = nn.Linear(config.inner_width, config.d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down(self.dropout(F.silu(self.gate(x)) * self.up(x)))
        return out


class Head(nn.Module):
    """(micro_batch, seq, d_model) to logits (micro_batch, seq, vocab_size)."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(config.d_model, eps=config.norm_eps)
        self.output = nn.Linear(config.d_model, config.vocab_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.output(self.norm(x))
        return logits


def _dropout(config: DecoderConfig) -> nn.Module:
    return KeyedDropout(config.dropout) if config.dropout > 0 else nn.Identity()


@lru_cache(maxsize=32)
def rotary_table(seq: int, width: int, theta: float, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosines and sines, (seq, 1, width / 2) each, of position x theta**(-2i / width); computed in float64."""
    frequencies = theta ** (-torch.arange(0, width, 2, dtype=torch.float64, device="cpu") / width)
    angles = torch.outer(torch.arange(seq, dtype=torch.float64, device="cpu"), frequencies).unsqueeze(1)
    return angles.cos().to(device, dtype), angles.sin().to(device, dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions: turns the pairs (x[i], x[i + width/2]) of (micro_batch, seq, heads, width) by their angle."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
