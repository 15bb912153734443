"""Boxes of tensor indices: the language in which state is held, wanted and moved."""

from dataclasses import dataclass
from functools import lru_cache
from math import prod
from operator import ge, gt, sub


@dataclass(frozen=True, slots=True, order=True)
class Box:
    """A half-open box of indices of one tensor: start[d] <= index[d] < stop[d] in every dimension d.

    A scalar has the box Box((), ()), of size 1.

    Raises:
        ValueError: if start and stop differ in length, or a side is negative.
    """

    start: tuple[int, ...]
    stop: tuple[int, ...]

    def __post_init__(self) -> None:
        if len(self.start) != len(self.stop) or any(map(gt, self.start, self.stop)) or min(self.start, default=0) < 0:
            raise ValueError(f"not a box: {self.start} to {self.stop}")

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(map(sub, self.stop, self.start))

    @property
    def size(self) -> int:
        """Number of elements."""
        return prod(self.shape)

    @property
    def slices(self) -> tuple[slice, ...]:
        """What indexes this box in the whole tensor."""
        return tuple(slice(a, b) for a, b in zip(self.start, self.stop, strict=True))

    def contains(self, other: "Box") -> bool:
        return all(a <= c and d <= b for a, b, c, d in zip(self.start, self.stop, other.start, other.stop, strict=True))

    def intersect(self, other: "Box") -> "Box | None":
        """The common box, or None where there is no common element."""
        start = tuple([max(a, c) for a, c in zip(self.start, other.start, strict=True)])
        stop = tuple([min(b, d) for b, d in zip(self.stop, other.stop, strict=True)])
        if any(map(ge, start, stop)):
            return None
        return Box(start, stop)

    def subtract(self, other: "Box") -> tuple["Box", ...]:
        """Disjoint boxes that cover what lies in this box and not in the other (at most two per dimension)."""
        common = self.intersect(other)
        if common is None:
            return (self,)
        rest: list[Box] = []
        start, stop = list(self.start), list(self.stop)
        for d in range(len(start)):
            if start[d] < common.start[d]:
                rest.append(Box(tuple(start), (*stop[:d], common.start[d], *stop[d + 1 :])))
            if common.stop[d] < stop[d]:
                rest.append(Box((*start[:d], common.stop[d], *start[d + 1 :]), tuple(stop)))
            start[d], stop[d] = common.start[d], common.stop[d]
        return tuple(rest)

    def within(self, outer: "Box") -> tuple[slice, ...]:
        """What indexes this box in a tensor that stores just the box `outer`."""
        return tuple(slice(a - c, b - c) for a, b, c in zip(self.start, self.stop, outer.start, strict=True))


def full(shape: tuple[int, ...]) -> Box:
    """The box of a whole tensor."""
    return Box((0,) * len(shape), shape)


@lru_cache(maxsize=4096)
def cut(shape: tuple[int, ...], dim: int | None, part: int, parts: int) -> Box:
    """The `part`-th of `parts` equal boxes along `dim`; the whole tensor if dim is None.

    Raises:
        ValueError: if the dimension does not divide.
    """
    if dim is None:
        return full(shape)
    if shape[dim] % parts:
        raise ValueError(f"dimension {dim} of shape {shape} does not divide by {parts}")
    each = shape[dim] // parts
    whole = full(shape)
    return Box(
        (*whole.start[:dim], part * each, *whole.start[dim + 1 :]),
        (*whole.stop[:dim], (part + 1) * each, *whole.stop[dim + 1 :]),
    )
