"""Keys of the configuration's section `model` that belong to the decoder."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from evenkeel.config_values import ConfigError, convert


@dataclass(frozen=True, slots=True)
class DecoderConfig:
    """Widths count features, seq_len tokens. The defaults make 3.1 million parameters over bytes.

    Attributes:
        kv_heads: heads of keys and values, each shared by heads / kv_heads query heads; null: as many as heads.
        d_ff: inner width of the feed-forward part; null: 8/3 d_model, rounded up to a multiple of 64.
        dropout: probability; 0 is none.
        tie_embeddings: whether the output layer's weight is the embedding's.
    """

    vocab_size: int = 256
    d_model: int = 256
    layers: int = 4
    heads: int = 4
    kv_heads: int | None = 2
    d_ff: int | None = None
    seq_len: int = 128
    dropout: float = 0.0
    tie_embeddings: bool = False
    rope_theta: float = 10000.0
    norm_eps: float = 1e-5

    @property
    def head_width(self) -> int:
        return self.d_model // self.heads

    @property
    def key_value_heads(self) -> int:
        return self.heads if self.kv_heads is None else self.kv_heads

    @property
    def inner_width(self) -> int:
        return -(-8 * self.d_model // (3 * 64)) * 64 if self.d_ff is None else self.d_ff


def read_config(values: Mapping[str, Any]) -> DecoderConfig:
    """Raises ConfigError, naming the key, for unknown keys, wrong types and sizes that do not fit each other."""
    config: DecoderConfig = convert(values, DecoderConfig, "model", "", False)
    for key in ("vocab_size", "d_model", "layers", "heads", "kv_heads", "d_ff", "seq_len"):
        value = getattr(config, key)
        _require(value is None or value > 0, key, f"is {value}; must be at least 1")
    for key in ("rope_theta", "norm_eps"):
        _require(getattr(config, key) > 0, key, f"is {getattr(config, key)}; must be above 0")
    _require(0 <= config.dropout < 1, "dropout", f"is {config.dropout}; expected 0 <= dropout < 1")
    _require(config.d_model % config.heads == 0, "heads", f"{config.heads} do not divide d_model {config.d_model}")
    even = config.head_width % 2 == 0
    _require(even, "heads", f"rotary positions need an even width per head, not {config.head_width}")
    key_values = config.key_value_heads
    _require(config.heads % key_values == 0, "kv_heads", f"{key_values} do not divide heads {config.heads}")
    return config


def _require(holds: bool, key: str, problem: str) -> None:
    if not holds:
        raise ConfigError(problem, f"model.{key}")
