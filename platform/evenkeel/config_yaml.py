"""YAML that anybody may have written: a user's file, or what a checkpoint that was made up calls its configuration.

libyaml takes a C frame for each level of nesting, an alias stands for all that it names, tags raise whatever their
constructors raise. So the text is read as a stream of events first, which takes no more memory the deeper it goes, and
is parsed only if it is within bounds that no real configuration comes near.
"""

import re
from dataclasses import dataclass
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from evenkeel.config_values import ConfigError, dotted

MAX_CHARACTERS = 1 << 18
MAX_DEPTH = 64
MAX_VALUES = 10_000
"""Scalars, lists and mappings, those that an alias stands for once more. OmegaConf 2.4 has the same limit."""
MAX_NUMBER = 300
"""Characters of what may be a number: reading 1:59:59:... as one takes the square of its length."""
MAX_INTERPOLATION = 4000
"""Characters of a text with ${...}, in which more YAML may stand."""

_LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_NUMBER = re.compile(r"[-+.0-9][-+.:_0-9A-Fa-fx]*")


@dataclass(slots=True)
class _Extent:
    """Of a node: how many values it is, itself included, and how many levels of lists and mappings."""

    anchor: str | None = None
    values: int = 1
    levels: int = 0

    def add(self, child: "_Extent") -> None:
        self.values += child.values
        self.levels = max(self.levels, child.levels + 1)


def parse(text: str, source: str) -> DictConfig:
    """The mapping that the text is; an empty one if it says nothing. Its leaves are what JSON has.

    Raises:
        ConfigError: for any other text, naming the source, and the line where that is known.
    """
    try:
        if not _is_mapping(check_bounds(text)):
            raise ConfigError("expected a mapping of sections at the top", source=source)
        values = OmegaConf.create(text) if text.strip() else OmegaConf.create({})
        assert isinstance(values, DictConfig)
        check_leaves(OmegaConf.to_container(values, resolve=False), "", source)
    except ConfigError:
        raise
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        at = f"{source}:{mark.line + 1}" if mark is not None else source
        raise ConfigError(f"not valid YAML: {getattr(error, 'problem', None) or 'unreadable'}", source=at) from None
    except OmegaConfBaseException as error:
        raise ConfigError(first_line(error), source=source) from None
    except Exception as error:  # what a tag makes of a text that is not of its type raises anything
        raise ConfigError(f"cannot be read: {type(error).__name__}: {first_line(error)}", source=source) from None
    return values


def check_bounds(text: str) -> yaml.NodeEvent | None:
    """The first node of a text that can be parsed without harm; None if it has none.

    Raises:
        yaml.YAMLError: if it is no YAML, or not within the bounds above.
    """
    if len(text) > MAX_CHARACTERS:
        raise yaml.MarkedYAMLError(problem=f"{len(text)} characters, at most {MAX_CHARACTERS} are read")
    first: yaml.NodeEvent | None = None
    around: list[_Extent] = []
    anchored: dict[str, _Extent] = {}
    for event in yaml.parse(text, Loader=_LOADER):
        first = event if first is None and isinstance(event, yaml.NodeEvent) else first
        if isinstance(event, yaml.CollectionStartEvent):
            anchored.pop(event.anchor or "", None)  # within itself it is not known, and refused when it is parsed
            around.append(_Extent(event.anchor, levels=1))
            _require(len(around) <= MAX_DEPTH, event, f"nested deeper than {MAX_DEPTH} levels")
            continue
        if isinstance(event, yaml.ScalarEvent):
            _check_scalar(event)
            node = _Extent(event.anchor)
        elif isinstance(event, yaml.AliasEvent):
            node = anchored.get(event.anchor or "", _Extent())
        elif isinstance(event, yaml.CollectionEndEvent):
            node = around.pop()
        else:
            continue
        if node.anchor is not None:
            anchored[node.anchor] = node
        if around:
            around[-1].add(node)
            many = f"more than {MAX_VALUES} values, with what each alias (*name) stands for"
            _require(around[-1].values <= MAX_VALUES, event, many)
            _require(around[-1].levels <= MAX_DEPTH, event, f"nested deeper than {MAX_DEPTH} levels by its aliases")
    return first


def _is_mapping(first: yaml.NodeEvent | None) -> bool:
    """Also one that nothing is said of. OmegaConf reads a bare word as a mapping of that word to nothing."""
    empty = first is None or (isinstance(first, yaml.ScalarEvent) and not first.value)
    return empty or isinstance(first, yaml.MappingStartEvent)


def _check_scalar(event: yaml.ScalarEvent) -> None:
    tagged, plain = event.tag is not None, event.implicit[0]
    number = tagged or (plain and _NUMBER.fullmatch(event.value))
    what = "a number, or a value with a tag (!), of more than"
    _require(not number or len(event.value) <= MAX_NUMBER, event, f"{what} {MAX_NUMBER} characters")
    short = "${" not in event.value or len(event.value) <= MAX_INTERPOLATION
    _require(short, event, f"a text with ${{...}} of more than {MAX_INTERPOLATION} characters")


def _require(holds: bool, event: Any, problem: str) -> None:
    if not holds:
        raise yaml.MarkedYAMLError(problem=problem, problem_mark=event.start_mark)


def check_leaves(value: Any, key: str, source: str) -> None:
    """Raises ConfigError for what has no form in JSON, as which a configuration is handed out: bytes, a path."""
    if isinstance(value, dict):
        for name, inner in value.items():
            check_leaves(name, dotted(key, name) if key else str(name), source)
            check_leaves(inner, dotted(key, name) if key else str(name), source)
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            check_leaves(inner, dotted(key, index), source)
    elif value is not None and not isinstance(value, str | int | float):
        raise ConfigError(f"is of type {type(value).__name__}; expected a text, a number or the like", key, source)


def first_line(error: Exception) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
