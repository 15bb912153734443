"""Copies and canonical forms of a controller's state, for exhaustive exploration."""

from collections import Counter, defaultdict, deque
from collections.abc import Hashable
from dataclasses import fields
from typing import Any, TypeVar

from evenkeel.control.incident import Incident
from evenkeel.control.liveness import Liveness
from evenkeel.control.member import Member
from evenkeel.control.modes import Aborting, Forming, Settling
from evenkeel.control.roster import Roster
from evenkeel.control.saving import Upload
from evenkeel.control.state import State
from evenkeel.control.trouble import Trouble

T = TypeVar("T")
CHANGING = (State, Roster, Trouble, Liveness, Incident, Forming, Aborting, Settling, Upload, Member)
"""Objects that change, or hold something that does; all other objects of a state are values."""
FIELDS: dict[type, tuple[str, ...]] = {kind: tuple(f.name for f in fields(kind)) for kind in CHANGING}
PLAIN: frozenset[type] = frozenset({type(None), bool, int, float, str})
"""Looked at first: exploring spends most of its time here."""

_names: dict[str, int] = {}
_seen: dict[int, tuple[Any, int]] = {}


def clone(value: T) -> T:
    """A copy that shares nothing that changes."""
    kind = type(value)
    if kind in PLAIN:
        return value
    if kind in FIELDS:
        copied = object.__new__(kind)
        for name in FIELDS[kind]:
            object.__setattr__(copied, name, clone(getattr(value, name)))
        return copied
    if isinstance(value, defaultdict):
        return type(value)(value.default_factory, {k: clone(v) for k, v in value.items()})
    if isinstance(value, dict):
        return type(value)({k: clone(v) for k, v in value.items()})
    if isinstance(value, deque):
        return type(value)(value, value.maxlen)
    if isinstance(value, list | set):
        return type(value)(value)
    return value


def freeze(value: Any) -> Hashable:
    """A hashable form, equal for equal values."""
    kind = type(value)
    if kind in PLAIN:
        return value  # type: ignore[no-any-return]
    if kind in FIELDS:
        return kind.__name__, *[freeze(getattr(value, name)) for name in FIELDS[kind]]
    if isinstance(value, Counter | dict):
        return tuple(sorted([(token(k), freeze(v)) for k, v in value.items()]))
    if isinstance(value, list | deque):
        return tuple(map(freeze, value))
    if isinstance(value, set | frozenset):
        return frozenset(map(token, value))
    if isinstance(value, int | float | str):
        return value
    return token(value)


def token(value: Any) -> int:
    """A number that stands for a value. By its repr, which tells all of a value of the core and of the messages."""
    known = _seen.get(id(value))
    if known is not None:
        return known[1]
    number = _names.setdefault(repr(value), len(_names))
    _seen[id(value)] = (value, number)
    return number
