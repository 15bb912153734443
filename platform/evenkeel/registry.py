"""Finds what a configuration names: something registered, or "module:function" of the user's."""

import importlib
from collections.abc import Callable, Mapping
from typing import Any

from evenkeel.config_values import ConfigError


def find(name: str, registered: Mapping[str, str], key: str) -> Callable[..., Any]:
    """The function that `name` stands for.

    Args:
        registered: short name to "module:function".
        key: of the configuration, for messages.

    Raises:
        ConfigError: for a name that is neither, a module that cannot be imported, or one without that function.
    """
    if ":" not in name and name not in registered:
        known = ", ".join(sorted(registered))
        raise ConfigError(f'{name!r} is not known; expected one of {known}, or "module:function" of your own', key)
    module_name, _, function_name = registered.get(name, name).partition(":")
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise ConfigError(f"cannot import {module_name!r}: {error}", key) from error
    function = getattr(module, function_name, None)
    if not callable(function):
        raise ConfigError(f"module {module_name!r} has no function {function_name!r}", key)
    return function  # type: ignore[no-any-return]
