"""What is read, written or sent in one go, so that little is in memory, and few calls are made."""

from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")


def batches(items: Iterable[T], size: Callable[[T], int], most: int) -> Iterator[list[T]]:
    """The items in order, in lists of at most so many bytes together; a larger one is alone. None is empty."""
    batch: list[T] = []
    held = 0
    for item in items:
        if batch and held + size(item) > most:
            yield batch
            batch, held = [], 0
        batch.append(item)
        held += size(item)
    if batch:
        yield batch
