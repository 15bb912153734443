"""Datasets by name."""

from collections.abc import Mapping
from typing import Any

from evenkeel.config_values import ConfigError
from evenkeel.data.dataset import Data
from evenkeel.engine.model import Model
from evenkeel.registry import find

DATASETS = {"text": "evenkeel.data.text:load", "digits": "evenkeel.data.digits:load"}


def load_data(name: str, config: Mapping[str, Any], model: Model | None = None) -> Data:
    """The data that the configuration's section `data` describes.

    Args:
        name: of a registered dataset, or "module:function" of the user's, called with `config`.
        config: the section's keys without `name`: path, eval_path and the dataset's own.
        model: gives keys that depend on it, such as seq_len, where `config` does not have them.

    Raises:
        ConfigError: naming the key, for bad values of registered datasets, for missing or empty files, and for
            functions that cannot be found or give no Data. What a user's function raises comes through as it is.
    """
    options = {**(model.data_options if model else {}), **config}
    data = find(name, DATASETS, "data.name")(options)
    if not isinstance(data, Data):
        raise ConfigError(f"{name!r} returned {type(data).__name__}, not an evenkeel.data.dataset.Data", "data.name")
    return data
