"""Values to JSON and back: for the journal, and for the trace of events that a controller can be replayed from.

Directed by types: `dump(value, tp)` and `load(data, tp)` follow the declared type, so what is written holds a "type"
tag only where a union leaves a choice. Floats keep every bit (JSON's shortest repr); those that JSON has no word for
are written as "nan", "inf" and "-inf". Sets and arbitrary objects have no form here, on purpose.
"""

import types
import typing
from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from enum import Enum
from functools import cache
from math import isfinite
from reprlib import Repr
from typing import Any, NewType, Union, get_args, get_origin

TAG = "type"
_NONFINITE = {"nan": float("nan"), "inf": float("inf"), "-inf": float("-inf")}
_REPR = Repr()
_REPR.maxstring = _REPR.maxlong = _REPR.maxother = 80


class CodecError(ValueError):
    """What does not fit, with the path to it, such as `WorldOpened.world.members[2].pid: an int expected, not 'x'`."""


def dump(value: Any, tp: Any) -> Any:
    """What json.dumps takes, for a value of type `tp`.

    Raises:
        CodecError: if the value is not of that type.
    """
    return _dump(value, tp, _name(tp))


def load(data: Any, tp: Any) -> Any:
    """The value of type `tp` that `dump` made `data` from, after any trip through JSON.

    A field that is not there has its default: it is newer than what was written.

    Raises:
        CodecError: for an unknown type tag, a missing field without a default, an unknown one, or a value of another
            type.
    """
    return _load(data, tp, _name(tp))


# ------------------------------------------------------------ to JSON


def _dump(value: Any, tp: Any, at: str) -> Any:
    tp = _plain(tp)
    origin = get_origin(tp)
    if tp is Any:
        return _any(value, at)
    if origin in (Union, types.UnionType):
        return _dump_union(value, tp, at)
    if origin is tuple:
        if not isinstance(value, tuple):
            raise _wrong(at, "a tuple", value)
        pairs = zip(value, _items(tp, len(value), at), strict=True)
        return [_dump(v, t, f"{at}[{i}]") for i, (v, t) in enumerate(pairs)]
    if origin is not None and issubclass(origin, Mapping):
        return _dump_mapping(value, get_args(tp), at)
    if is_dataclass(tp):
        if type(value) is not tp:
            raise _wrong(at, _name(tp), value)
        return {n: _dump(getattr(value, n), t, f"{at}.{n}") for n, t in _hints(typing.cast(type, tp))}
    return _dump_scalar(value, tp, at)


def _dump_union(value: Any, tp: Any, at: str) -> Any:
    options = _options(tp)
    if value is None and type(None) in options:
        return None
    named = _named(options)
    chosen = named.get(type(value).__name__)
    if chosen is not None and type(value) is chosen:
        data = _dump(value, chosen, _name(chosen) if at == _name(tp) else at)
        return data if len(named) == 1 else {TAG: _name(chosen), **data}
    rest = [t for t in options if t is not type(None) and not is_dataclass(t)]
    if len(rest) != 1:
        raise _wrong(at, f"one of {_choice(options)}", value)
    return _dump(value, rest[0], at)


def _dump_mapping(value: Any, args: tuple[Any, ...], at: str) -> Any:
    if not isinstance(value, Mapping):
        raise _wrong(at, "a mapping", value)
    key_type, value_type = args
    if _plain(key_type) is not str:
        raise CodecError(f"{at}: keys of JSON objects are strings, not {_name(key_type)}")
    return {_dump(k, str, f"{at} key"): _dump(v, value_type, f"{at}[{k!r}]") for k, v in value.items()}


def _dump_scalar(value: Any, tp: Any, at: str) -> Any:
    if isinstance(tp, type) and issubclass(tp, Enum):
        if not isinstance(value, tp):
            raise _wrong(at, tp.__name__, value)
        return value.value
    if tp is float and isinstance(value, float):
        return float(value) if isfinite(value) else repr(float(value))
    if tp is float and _is_int(value):
        return float(value)
    if _fits(value, tp):
        return value
    raise _wrong(at, _name(tp), value)


def _any(value: Any, at: str) -> Any:
    """A value that declares no type: only what JSON gives back as it was, tuples becoming lists."""
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, float):
        return value if isfinite(value) else repr(value)
    if isinstance(value, list | tuple):
        return [_any(v, f"{at}[{i}]") for i, v in enumerate(value)]
    if isinstance(value, Mapping) and all(isinstance(k, str) for k in value):
        return {k: _any(v, f"{at}[{k!r}]") for k, v in value.items()}
    raise _wrong(at, "a value that JSON has", value)


# ------------------------------------------------------------ from JSON


def _load(data: Any, tp: Any, at: str) -> Any:
    tp = _plain(tp)
    origin = get_origin(tp)
    if tp is Any:
        return data
    if origin in (Union, types.UnionType):
        return _load_union(data, tp, at)
    if origin is tuple:
        if not isinstance(data, list | tuple):
            raise _wrong(at, "a list", data)
        pairs = zip(data, _items(tp, len(data), at), strict=True)
        return tuple(_load(v, t, f"{at}[{i}]") for i, (v, t) in enumerate(pairs))
    if origin is not None and issubclass(origin, Mapping):
        if not isinstance(data, dict):
            raise _wrong(at, "an object", data)
        of = get_args(tp)[1]
        return {_load(k, str, f"{at} key"): _load(v, of, f"{at}[{_shown(k)}]") for k, v in data.items()}
    if is_dataclass(tp):
        return _load_dataclass(data, tp, at)
    return _load_scalar(data, tp, at)


def _load_union(data: Any, tp: Any, at: str) -> Any:
    options = _options(tp)
    if data is None and type(None) in options:
        return None
    named = _named(options)
    if named and isinstance(data, dict):
        if len(named) == 1:
            return _load(data, next(iter(named.values())), at)
        tag = data.get(TAG)
        if not isinstance(tag, str) or tag not in named:
            raise CodecError(f"{at}: type {_shown(tag)} is not one of {_choice(options)}")
        body = {k: v for k, v in data.items() if k != TAG}
        return _load(body, named[tag], tag if at == _name(tp) else at)
    rest = [t for t in options if t is not type(None) and not is_dataclass(t)]
    if len(rest) != 1:
        raise _wrong(at, f"one of {_choice(options)}", data)
    return _load(data, rest[0], at)


def _load_dataclass(data: Any, tp: Any, at: str) -> Any:
    if not isinstance(data, dict):
        raise _wrong(at, _name(tp), data)
    hints = dict(_hints(tp))
    unknown = sorted(data.keys() - hints.keys())
    if unknown:
        raise CodecError(f"{at}: {_name(tp)} has no field {_shown(unknown[0])}")
    absent = [n for n in hints if n not in data]
    missing = [n for n in absent if n not in _with_default(tp)]
    if missing:
        raise CodecError(f"{at}: field {missing[0]!r} of {_name(tp)} is missing")
    try:
        return tp(**{n: _load(data[n], t, f"{at}.{n}") for n, t in hints.items() if n in data})
    except CodecError:
        raise
    except ValueError as error:
        raise CodecError(f"{at}: {error}") from error


def _load_scalar(data: Any, tp: Any, at: str) -> Any:
    if isinstance(tp, type) and issubclass(tp, Enum):
        try:
            return tp(data)
        except ValueError as error:
            raise _wrong(at, tp.__name__, data) from error
    if tp is float:
        if isinstance(data, str) and data in _NONFINITE:
            return _NONFINITE[data]
        try:
            if isinstance(data, float) or _is_int(data):
                return float(data)
        except OverflowError:  # an int of more than 308 digits
            pass
        raise _wrong(at, "a float", data)
    if _fits(data, tp):
        return data
    raise _wrong(at, _name(tp), data)


# ------------------------------------------------------------ types


def _plain(tp: Any) -> Any:
    """The type below a NewType."""
    while isinstance(tp, NewType):
        tp = tp.__supertype__
    return tp


@cache
def _hints(tp: type) -> tuple[tuple[str, Any], ...]:
    hints = typing.get_type_hints(tp)
    for f in fields(tp):
        if not f.init or f.name == TAG:
            raise CodecError(f"{tp.__name__}.{f.name}: a field that is not of the constructor or is named {TAG!r}")
    return tuple((f.name, hints[f.name]) for f in fields(tp))


@cache
def _with_default(tp: type) -> frozenset[str]:
    return frozenset(f.name for f in fields(tp) if f.default is not MISSING or f.default_factory is not MISSING)


def _items(tp: Any, length: int, at: str) -> tuple[Any, ...]:
    args = get_args(tp)
    if len(args) == 2 and args[1] is Ellipsis:
        return (args[0],) * length
    if len(args) != length:
        raise CodecError(f"{at}: {len(args)} items expected, not {length}")
    return args


def _options(tp: Any) -> tuple[Any, ...]:
    return tuple(_plain(t) for t in get_args(tp))


def _named(options: tuple[Any, ...]) -> dict[str, Any]:
    return {_name(t): t for t in options if is_dataclass(t)}


def _fits(value: Any, tp: Any) -> bool:
    if tp is bool:
        return isinstance(value, bool)
    if tp is int:
        return _is_int(value)
    if tp is str:
        return isinstance(value, str)
    if tp is type(None):
        return value is None
    raise CodecError(f"{_name(tp)} has no form in JSON here")


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _name(tp: Any) -> str:
    return tp.__name__ if isinstance(tp, type) or hasattr(tp, "__name__") else str(tp)


def _choice(options: tuple[Any, ...]) -> str:
    return ", ".join(_name(t) for t in options)


def _wrong(at: str, expected: str, value: Any) -> CodecError:
    return CodecError(f"{at}: {expected} expected, not {_shown(value)}")


def _shown(value: Any) -> str:
    """Short, and made without going through all of it."""
    shown = _REPR.repr(value)
    return shown if len(shown) <= 80 else shown[:77] + "..."
