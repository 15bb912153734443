"""Whether boxes cover a tensor exactly once."""

from collections.abc import Sequence
from itertools import product
from math import prod

from evenkeel.core.boxes import Box

MAX_CORNERS = 1 << 22
"""Bounds the work on a manifest that lies: two million rows of a matrix, or a million boxes cut both ways."""


def check_tiling(boxes: Sequence[Box], shape: tuple[int, ...]) -> None:
    """Raises ValueError, naming an element, unless each element of the tensor is in exactly one of the boxes.

    A box is the sum of its 2^d corners, +1 or -1 by the number of coordinates that are stops (inclusion and
    exclusion), and counts how often an element is covered add up like these. So the boxes tile the tensor if and only
    if all their corners cancel out but those of the tensor itself: exact, and linear in the number of boxes. At the
    first corner, in index order, that does not cancel, what is left over is the error in the count of that element.
    """
    for box in boxes:
        if len(box.start) != len(shape) or any(b > n for b, n in zip(box.stop, shape, strict=True)):
            raise ValueError(f"box {_shown(box)} is not within the tensor's shape {list(shape)}")
    # Dimensions that no box is cut in add nothing but corners.
    dims = [d for d, n in enumerate(shape) if any(b.start[d] > 0 or b.stop[d] < n for b in boxes)]
    if len(boxes) << len(dims) > MAX_CORNERS:
        raise ValueError(f"{len(boxes)} boxes cut in {len(dims)} dimensions are more than can be checked")
    left: dict[tuple[int, ...], int] = {}
    for box in boxes:
        if box.size:
            _add(left, [(box.start[d], box.stop[d]) for d in dims], 1)
    if 0 not in shape:
        _add(left, [(0, shape[d]) for d in dims], -1)
    if not left:
        return
    wrong = min(left)
    element = [0] * len(shape)
    for d, index in zip(dims, wrong, strict=True):
        element[d] = index
    times = left[wrong] + 1
    raise ValueError(f"element {element} is in {times or 'none'} of its slices")


def _add(left: dict[tuple[int, ...], int], sides: list[tuple[int, int]], sign: int) -> None:
    """Adds the signed corners of a box to `left`, which holds no zeros."""
    for corner in product(*(((a, 1), (b, -1)) for a, b in sides)):
        index = tuple(at for at, _ in corner)
        count = left.pop(index, 0) + sign * prod(side for _, side in corner)
        if count:
            left[index] = count


def _shown(box: Box) -> str:
    return f"{list(box.start)} to {list(box.stop)}"
