"""Single values of a configuration: converting them to their types, naming what is wrong, hiding secrets."""

import difflib
import re
import types
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, fields, is_dataclass
from itertools import pairwise
from math import isfinite
from typing import Any, Union, get_args, get_origin, get_type_hints

HIDDEN = "***"


def shortened(text: str, most: int) -> str:
    """With so many characters at most."""
    return text if len(text) <= most else f"{text[: most - 3]}..."


class ConfigError(ValueError):
    """Bad configuration, in one line: source, key, what is wrong and what is expected."""

    def __init__(self, problem: str, key: str = "", source: str = "") -> None:
        self.problem, self.key, self.source = " ".join(problem.split()), key, source
        told = (source, shortened(key, 200), shortened(self.problem, 1000))
        super().__init__(": ".join(part for part in told if part))

    def __reduce__(self) -> tuple[type["ConfigError"], tuple[str, str, str]]:
        # The default would pass the composed line as the problem when the error crosses a process border.
        return ConfigError, (self.problem, self.key, self.source)


def nearest_key(key: str, valid: Sequence[str]) -> str:
    """The valid dotted key that looks most like `key`; one of the same section if it has any that is close."""
    section = key.rpartition(".")[0]
    siblings = [v for v in valid if v.rpartition(".")[0] == section]
    for candidates, cutoff in ((siblings, 0.6), (list(valid), 0.0)):
        if close := difflib.get_close_matches(key, candidates, 1, cutoff):
            return close[0]
    return "none"


def dotted(first: object, *parts: object) -> str:
    """The parts as one key; at the top the first is ""."""
    return ".".join(str(part) for part in ((first, *parts) if first != "" else parts))


def convert(value: Any, kind: Any, key: str, source: str, partial: bool, valid: Sequence[str] = ()) -> Any:
    """The value as an instance of `kind`: int, float, str, bool, Any, a dataclass, list[...], dict[...] or X | None.

    Nothing is guessed: 1 is a float where one is expected, but "1" is no number and 1.5 no int.

    Args:
        partial: lets "${...}" stand for any type, and fields without a default be missing.
        valid: all dotted keys, from which the nearest to an unknown one is named.

    Raises:
        ConfigError: naming source and key.
    """
    if kind is Any or (partial and isinstance(value, str) and "${" in value):
        return value
    if get_origin(kind) in (Union, types.UnionType):
        if value is None:
            return None
        (kind,) = (k for k in get_args(kind) if k is not type(None))
    if is_dataclass(kind) and isinstance(kind, type):
        return _convert_section(value, kind, key, source, partial, valid)
    if get_origin(kind) is list:
        if not isinstance(value, list):
            raise _wrong_type(value, "a list", key, source)
        return [convert(v, get_args(kind)[0], dotted(key, i), source, partial, valid) for i, v in enumerate(value)]
    if get_origin(kind) is dict:
        if not isinstance(value, Mapping):
            raise _wrong_type(value, "a mapping", key, source)
        of_key, of_value = get_args(kind)
        keys = [_convert_key(k, of_key, dotted(key, k), source) for k in value]
        values = [convert(v, of_value, dotted(key, k), source, partial, valid) for k, v in value.items()]
        return dict(zip(keys, values, strict=True))
    return _convert_scalar(value, kind, key, source)


def _convert_section(value: Any, kind: type, key: str, source: str, partial: bool, valid: Sequence[str]) -> Any:
    if not isinstance(value, Mapping):
        raise _wrong_type(value, "a mapping", key, source)
    hints = get_type_hints(kind)
    own = [dotted(key, name) for name in hints]
    for name in value:
        if name not in hints:
            near = nearest_key(dotted(key, name), [*own, *(v for v in valid if v not in own)])
            raise ConfigError(f"unknown key; nearest valid key: {near}", dotted(key, name), source)
    for field in fields(kind):
        if field.default is MISSING and field.default_factory is MISSING and field.name not in value:
            raise ConfigError("is missing", dotted(key, field.name), source)
    return kind(**{k: convert(v, hints[k], dotted(key, k), source, partial, valid) for k, v in value.items()})


def _convert_key(value: Any, kind: type, key: str, source: str) -> Any:
    # Overrides such as emulate.slowdown.3=2 arrive with the key as a text.
    if kind is int and isinstance(value, str) and value.isdecimal():
        return int(value)
    if kind is str:
        return str(value)
    return _convert_scalar(value, kind, key, source)


_NAMES = {int: "a whole number", float: "a number", str: "a text", bool: "true or false"}


def _convert_scalar(value: Any, kind: type, key: str, source: str) -> Any:
    if kind is float and type(value) in (int, float) and isfinite(value):
        return float(value)
    # A name or path that looks like a number is still a text: run.name=7.
    if kind is str and type(value) is int:
        return str(value)
    if type(value) is not kind or kind is float:
        raise _wrong_type(value, _NAMES[kind], key, source)
    return value


def _wrong_type(value: Any, expected: str, key: str, source: str) -> ConfigError:
    said = "null" if value is None else repr(hide_value(key, value))
    return ConfigError(f"expected {expected}, got {shortened(said, 60)}", key, source)


def flatten(values: Any, prefix: str = "") -> dict[str, Any]:
    """Nested mappings and lists as dotted key -> leaf; an empty mapping or list is a leaf of its own."""
    items: list[tuple[Any, Any]]
    if isinstance(values, Mapping) and values:
        items = list(values.items())
    elif isinstance(values, list) and values:
        items = list(enumerate(values))
    else:
        return {prefix: values}
    flat: dict[str, Any] = {}
    for key, value in items:
        flat |= flatten(value, dotted(prefix, key) if prefix else str(key))
    return flat


_SECRET_WORDS = ("secret", "password", "passwd", "credential", "credentials", "passphrase")
_SECRET_ENDS = ("token", "signature", "sig")
_KEY_OWNERS = ("api", "access", "private", "account", "secret", "encryption")
_AT = re.compile("@|%40")
_COLON = re.compile(":|%3a", re.IGNORECASE)
_NEXT_URL = re.compile(r"(?:::|\s)[\w+.-]+(?=::|://)(?:://)?")
"""Where another one begins, in a text, or chained like simplecache::s3://; no "//" of a secret is taken for it."""

_USER = re.compile(r"(?<=://)[^/@\s]+(?=@)")
_QUERY_VALUE = re.compile(r"([?&])([^=&#\s]+)=([^&#\s]*)")


def is_secret(name: str) -> bool:
    """Whether a key's own name says that its value is one: secret_key, apiKey, hf_token; not max_tokens."""
    words = [w.lower() for w in re.findall(r"[A-Z]?[a-z0-9]+|[A-Z]+(?![a-z])", name)]
    if any(w in _SECRET_WORDS or w in ("apikey", "accesskey") for w in words) or words[-1:] == ["auth"]:
        return True
    return bool(words and words[-1] in _SECRET_ENDS) or any(
        a in _KEY_OWNERS and b == "key" for a, b in pairwise(words)
    )


def hide_secrets(values: Any) -> Any:
    """A copy in which secrets are "***": by the name of the key, all of `storage_options`, credentials within URLs."""
    if isinstance(values, Mapping):
        return {
            key: HIDDEN if is_secret(str(key)) and value is not None else _hide_all(value)
            if key == "storage_options" else hide_secrets(value)
            for key, value in values.items()
        }
    if isinstance(values, list):
        return [hide_secrets(value) for value in values]
    return hide_in_url(values) if isinstance(values, str) else values


def secret_values(values: Any) -> dict[str, Any]:
    """What `hide_secrets` hides, or hides a part of, by dotted key."""
    shown = flatten(hide_secrets(values))
    return {key: value for key, value in flatten(values).items() if shown.get(key) != value}


def hide_value(key: str, value: Any) -> Any:
    """The value as `hide_secrets` leaves it where it stands, at this dotted key."""
    parts = key.split(".")
    for part in reversed(parts):
        value = {part: value}
    hidden = hide_secrets(value)
    for part in parts:
        if isinstance(hidden, Mapping):
            hidden = hidden[part]
    return hidden


def hide_in_url(text: str) -> str:
    """The text without user:password@ and without the values of secret query parameters."""
    head, scheme, _ = text.partition("://")
    if not scheme:
        return text
    if any(_AT.search(value) for value in query_secrets(text)):
        return f"{head}{scheme}{HIDDEN}"  # nobody can tell which "@" ends what
    for found in credentials_in(text):
        text = re.sub(f"(?<=://){re.escape(found)}(?={_AT.pattern})", HIDDEN, text)
    return _QUERY_VALUE.sub(lambda m: f"{m[1]}{m[2]}={HIDDEN if is_secret(m[2]) else m[3]}", text)


def credentials_in(url: str) -> list[str]:
    """What a URL, or a text with some, says before an "@": "user:password", or a name or token alone.

    A secret may hold any character: "/" and "@" should be written %2F and %40 there, but half of all AWS secrets have
    a "/". So all from the first scheme to the last "@" counts where a ":" is in it; else only what stands before an "@"
    in the place of the host, and s3://bucket/a@b has none.
    """
    rest = url.partition("://")[2]
    before = rest[: max((at.start() for at in _AT.finditer(rest)), default=0)]
    return [before] if _COLON.search(_NEXT_URL.sub("", before)) else _USER.findall(url)


def query_secrets(url: str) -> list[str]:
    """The values of secret query parameters: "x" of ?token=x."""
    return [m[3] for m in _QUERY_VALUE.finditer(url) if is_secret(m[2])]


def _hide_all(values: Any) -> Any:
    if isinstance(values, Mapping):
        return {key: _hide_all(value) for key, value in values.items()}
    if isinstance(values, list):
        return [_hide_all(value) for value in values]
    return HIDDEN
