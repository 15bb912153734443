"""The configuration of a run: what may be said, where it was said, and what of it makes sense.

YAML files merge left to right, then mappings from Python, then key=value overrides. A wrong key or type is found
in the source that says it, before merging, so that the message can name the file. Imports omegaconf and nothing
heavier.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, cast, get_type_hints

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from evenkeel.config_check import check
from evenkeel.config_schema import SECTIONS, STDLIB, Config, FaultSection, valid_keys
from evenkeel.config_values import ConfigError, convert, flatten, hide_in_url, hide_secrets, hide_value, nearest_key
from evenkeel.config_yaml import check_bounds, check_leaves, first_line, parse

__all__ = [
    "Config",
    "ConfigError",
    "FaultSection",
    "changes",
    "config_from_yaml",
    "differences",
    "load_config",
    "read_text",
    "stored_fingerprint",
    "to_yaml",
    "with_absolute_data",
    "with_absolute_storage",
]

COMMAND_LINE = "command line"
FINGERPRINT = "dataset_fingerprint"
"""A key of a written configuration that nobody sets: two runs of one name must see the same data."""


@dataclass(frozen=True, slots=True)
class Layer:
    """What one source says: a file, Python, or one override."""

    source: str
    values: DictConfig


def load_config(
    paths: Sequence[str | Path], overrides: Sequence[str] = (), values: Mapping[str, Any] | None = None
) -> Config:
    """Reads YAML files, left to right, then `values` given in Python, then key=value overrides; later ones win.

    Mappings are merged, lists are replaced as a whole.

    Raises:
        ConfigError: one line that names source and key.
    """
    layers = [read_layer(read_text(path), str(path)) for path in paths]
    if values is not None:
        layers.append(Layer("Python", _create(dict(values), "Python")))
    layers.extend(_override(text) for text in overrides)
    return _merge(layers)


def config_from_yaml(text: str, source: str) -> Config:
    """The configuration that `to_yaml` wrote, such as a run directory's config.yaml."""
    layer = read_layer(text, source)
    layer.values.pop(FINGERPRINT, None)
    return _merge([layer])


def stored_fingerprint(text: str) -> str:
    """The dataset's fingerprint that `to_yaml` wrote beside the configuration; "" if none."""
    return str(read_layer(text, "config.yaml").values.get(FINGERPRINT) or "")


def read_layer(text: str, source: str) -> Layer:
    """Raises ConfigError with file and line where the text is not YAML or not a mapping."""
    return Layer(source, parse(text, source))


def read_text(path: str | Path) -> str:
    """Raises ConfigError if the file cannot be read."""
    try:
        return Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"cannot be read: {error.strerror}", source=str(path)) from None
    except UnicodeDecodeError:
        raise ConfigError("is not a text in UTF-8", source=str(path)) from None


def _create(values: dict[str, Any], source: str) -> DictConfig:
    try:
        return OmegaConf.create(values)
    except OmegaConfBaseException as error:
        raise ConfigError(first_line(error), source=source) from None


def _override(text: str) -> Layer:
    key, equals, raw = text.partition("=")
    if not equals or not all(part.strip() for part in key.split(".")):
        raise ConfigError(f"{hide_in_url(text)!r} is not of the form key=value", source=COMMAND_LINE)
    try:
        check_bounds(raw)
        values = OmegaConf.from_dotlist([text])
        check_leaves(OmegaConf.to_container(values, resolve=False), "", COMMAND_LINE)
        # A text stays what was typed: run.name=20260101_12 is a number to YAML, run.name= is null.
        kind = _leaf_type(key)
        number = type(OmegaConf.select(values, key, throw_on_resolution_failure=False)) in (int, float, bool)
        if (kind in (str, str | None) and number) or (kind is str and not raw):
            OmegaConf.update(values, key, raw)
    except Exception:  # as in config_yaml.parse
        raise ConfigError(f"the value {hide_value(key, raw)!r} cannot be read", key=key, source=COMMAND_LINE) from None
    return Layer(COMMAND_LINE, values)


def _leaf_type(key: str) -> Any:
    """The declared type of a key section.name; None where there is no such key."""
    section, _, name = key.partition(".")
    kind = get_type_hints(Config).get(section)
    return get_type_hints(kind).get(name) if is_dataclass(kind) else None


def _merge(layers: Sequence[Layer]) -> Config:
    sources: dict[str, str] = {}
    merged = OmegaConf.create({})
    for layer in layers:
        said = cast(dict[str, Any], OmegaConf.to_container(layer.values, resolve=False))
        said = {k: v for k, v in said.items() if v is not None or k not in SECTIONS}
        _build(said, layer.source)
        for key in flatten(said):
            sources.pop(key, None)  # so that they stand in the order in which they were said last
            sources[key] = layer.source
        merged = cast(DictConfig, OmegaConf.merge(merged, OmegaConf.create(said)))
    try:
        resolved = cast(dict[str, Any], OmegaConf.to_container(merged, resolve=True))
    except Exception as error:  # resolvers raise anything
        key = str(getattr(error, "full_key", "") or "")
        raise ConfigError(first_line(error), key=key, source=sources.get(key, "")) from None
    config = replace(_build(resolved, "configuration", partial=False), sources=sources)
    check(config)
    return config


def _build(values: Mapping[str, Any], source: str, partial: bool = True) -> Config:
    """Converts every value to its type; `partial` lets interpolations pass, to be resolved after merging."""
    hints = get_type_hints(Config)
    built: dict[str, Any] = {}
    for key, value in values.items():
        if key not in SECTIONS:
            near = nearest_key(str(key), valid_keys())
            raise ConfigError(f"unknown key; nearest valid key: {near}", str(key), source)
        if key in ("model", "data") and isinstance(value, Mapping):
            own = {f.name for f in fields(hints[key])} - {"options"}
            free = {str(k): v for k, v in value.items() if k not in own}
            value = {**{k: v for k, v in value.items() if k in own}, "options": free}
        built[key] = convert(value, hints[key], key, source, partial, valid_keys())
    return Config(**built)


# ---------------------------------------------------------------- going on with a run

_MAY_DIFFER = ("scaling.", "parallel.", "redundancy.", "checkpoint.", "faults.", "emulate.", "run.orphan_minutes")


def to_yaml(config: Config, fingerprint: str = "") -> str:
    """The whole configuration, resolved, with secrets replaced by "***", and the dataset's fingerprint if given."""
    values = hide_secrets(config.as_mapping()) | ({FINGERPRINT: fingerprint} if fingerprint else {})
    return OmegaConf.to_yaml(OmegaConf.create(values))


def differences(old: Config, new: Config) -> list[tuple[str, Any, Any]]:
    """What a run may not change when it goes on: (key, old value, new value), None where a key is not there.

    Secrets are compared as they are written down, that is not at all. run.storage_path is where the run was found,
    so it cannot be wrong, only spelt otherwise (moved, mounted elsewhere, with other credentials).
    """
    longer = new.train.steps >= old.train.steps
    return [found for found in _differing(old, new) if not _may_differ(found[0], longer)]


def changes(old: Config, new: Config) -> list[tuple[str, Any, Any]]:
    """What differs and may, in the form of `differences`: a run that goes on takes the new values."""
    longer = new.train.steps >= old.train.steps
    return [found for found in _differing(old, new) if _may_differ(found[0], longer)]


def _may_differ(key: str, longer: bool) -> bool:
    return any(f"{key}.".startswith(name) for name in _MAY_DIFFER) or (key == "train.steps" and longer)


def _differing(old: Config, new: Config) -> list[tuple[str, Any, Any]]:
    a, b = (flatten(hide_secrets(c.as_mapping())) for c in (old, new))
    keys = [key for key in dict.fromkeys((*a, *b)) if key != "run.storage_path"]
    return [(key, a.get(key), b.get(key)) for key in keys if a.get(key) != b.get(key)]


def with_absolute_storage(config: Config) -> Config:
    """The same with a relative local storage_path made absolute: actors run in other directories than the driver."""
    path = config.run.storage_path
    return config if _is_url(path) else replace(config, run=replace(config.run, storage_path=_absolute(path)))


def with_absolute_data(config: Config) -> Config:
    """The same with the local paths of the data made absolute, where the driver finds something there.

    Elsewhere it may be the name of anything, such as "stdlib" of the text dataset, or of one of the user's.
    """
    data = config.data
    held_out = None if data.eval_path is None else _found(data.eval_path)
    return replace(config, data=replace(data, path=_found(data.path), eval_path=held_out))


def _is_url(path: str) -> bool:
    """Whether it is fsspec's to read: a URL, or several chained."""
    return "://" in path or "::" in path


def _found(path: str) -> str:
    absolute = _absolute(path)
    return absolute if path not in ("", STDLIB) and not _is_url(path) and Path(absolute).exists() else path


def _absolute(path: str) -> str:
    """As a shell has it: ~ is the user's home."""
    return os.path.abspath(os.path.expanduser(path))
