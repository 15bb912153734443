"""1,797 handwritten digits of 8 x 8 pixels, as they come with scikit-learn."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from evenkeel.config_values import ConfigError, convert
from evenkeel.data.dataset import Data, TensorDataset

_PEAK = 16.0
"""Value of a black pixel."""


@dataclass(frozen=True, slots=True)
class DigitsConfig:
    """Keys of section `data`. `path` and `eval_path` are not used; the last `eval_share` is for validation."""

    path: str = ""
    eval_path: str | None = None
    eval_share: float = 0.2


def load(config: Mapping[str, Any]) -> Data:
    """Inputs (n, 64) float32 within 0 and 1, targets (n,) int64. Raises ConfigError if scikit-learn is missing."""
    c: DigitsConfig = convert(config, DigitsConfig, "data", "", False)
    if not 0 <= c.eval_share < 1:
        raise ConfigError(f"is {c.eval_share}; expected 0 <= eval_share < 1", "data.eval_share")
    try:
        from sklearn.datasets import load_digits  # type: ignore[import-not-found, unused-ignore]
    except ImportError as error:
        raise ConfigError("'digits' needs scikit-learn: pip install scikit-learn", "data.name") from error
    pixels, labels = load_digits(return_X_y=True)
    inputs = torch.tensor(pixels, dtype=torch.float32) / _PEAK
    targets = torch.tensor(labels, dtype=torch.int64)
    kept = len(inputs) - int(len(inputs) * c.eval_share)
    evaluation = TensorDataset(inputs[kept:], targets[kept:]) if kept < len(inputs) else None
    return Data(TensorDataset(inputs[:kept], targets[:kept]), evaluation)
