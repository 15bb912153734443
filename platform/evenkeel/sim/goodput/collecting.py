"""Python's search for values that hold one another in cycles."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager

SELDOM = 200_000
"""New values between two searches; Python's usual is 700."""


@contextmanager
def seldom_collected() -> Iterator[None]:
    """Millions of small values come and go here, and next to none in cycles: Python's search for those is put off."""
    before = gc.get_threshold()
    gc.set_threshold(SELDOM, *before[1:])
    try:
        yield
    finally:
        gc.set_threshold(*before)
