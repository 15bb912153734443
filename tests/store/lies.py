"""Where in a file of JSON a lie can stand."""

from collections.abc import Iterator
from typing import Any


def places(values: Any) -> Iterator[tuple[Any, Any]]:
    """Every container with each of its keys or indices."""
    for key in list(values) if isinstance(values, dict) else range(len(values)):
        yield values, key
        if isinstance(values[key], dict | list):
            yield from places(values[key])
