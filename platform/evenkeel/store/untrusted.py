"""What files say that may be damaged or made up: JSON without harm, and of its errors no more than a line."""

import json
from typing import Any

from evenkeel.config_values import shortened

MAX_DEPTH = 64
"""Levels of JSON. What is written here has some 12; more would end in whatever goes through them, one call a level."""
MAX_NUMBER = 2**62
LATEST = 1e11
"""Unix seconds; no time of this age."""
MAX_SIDES = 64
"""Dimensions of a tensor, as NumPy has them."""


def parse_json(data: bytes | str, **hooks: Any) -> Any:
    """What json.loads gives.

    Raises:
        ValueError: for whatever it cannot read or should not, in one short line.
    """
    try:
        values = json.loads(data, **hooks)
        if _levels_exceed(values):
            raise RecursionError
    except RecursionError:
        raise ValueError("nested too deeply") from None
    except ValueError as error:
        raise ValueError(f"not valid JSON: {short(error)}") from None
    return values


def _levels_exceed(values: Any) -> bool:
    level = [values] if isinstance(values, dict | list) else []
    for _ in range(MAX_DEPTH):
        inner = (v for c in level for v in (c.values() if isinstance(c, dict) else c))
        level = [v for v in inner if isinstance(v, dict | list)]
        if not level:
            return False
    return True


def short(said: object, most: int = 300) -> str:
    """In one line of so many characters at most, those that cannot be printed escaped."""
    text = shortened(" ".join(str(said).split()), most)
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def is_number(value: Any) -> bool:
    """Whether it is a whole number that something can be counted with: 0 to MAX_NUMBER."""
    return type(value) is int and 0 <= value <= MAX_NUMBER
