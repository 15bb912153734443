"""Models by name. A model folder holds config.py (its keys), model.py (its layers) and plan.py (how those are cut)."""

from collections.abc import Mapping
from typing import Any

from evenkeel.config_values import ConfigError
from evenkeel.engine.model import Model
from evenkeel.registry import find

MODELS = {"decoder": "evenkeel.models.decoder.model:build"}


def load_model(name: str, config: Mapping[str, Any]) -> Model:
    """The model that the configuration's section `model` describes.

    Args:
        name: of a registered model, or "module:function" of the user's, called with `config`.
        config: the section's own keys, without `name`.

    Raises:
        ConfigError: naming the key, for bad values of registered models and for functions that cannot be found or
            give no Model. What a user's function raises comes through as it is.
    """
    model = find(name, MODELS, "model.name")(dict(config))
    if not isinstance(model, Model):
        raise ConfigError(f"{name!r} returned {type(model).__name__}, not an evenkeel.engine.model.Model", "model.name")
    return model
