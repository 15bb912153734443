"""Covering exactly once, against counting every element."""

import random

import numpy as np
import pytest
from checkpoint_state import random_box, random_cut

from evenkeel.core.boxes import Box, full
from evenkeel.store.checkpoint_tiling import MAX_CORNERS, check_tiling


def test_against_counting() -> None:
    right = wrong = 0
    for seed in range(4000):
        rng = random.Random(seed)
        shape = tuple(rng.randint(0, 4) for _ in range(rng.randint(0, 3)))
        boxes = random_cut(full(shape), rng, rng.randint(0, 3))
        for _ in range(rng.randint(0, 2)):
            match rng.randrange(3):
                case 0 if boxes:
                    boxes.pop(rng.randrange(len(boxes)))
                case 1:
                    boxes.append(random_box(shape, rng))
                case 2 if boxes:
                    boxes[rng.randrange(len(boxes))] = random_box(shape, rng)
        rng.shuffle(boxes)
        count = np.zeros(shape, int)
        for box in boxes:
            count[box.slices] += 1
        if (count == 1).all():
            right += 1
            check_tiling(boxes, shape)
            continue
        wrong += 1
        with pytest.raises(ValueError) as caught:
            check_tiling(boxes, shape)
        first = next(index for index in np.ndindex(shape) if count[index] != 1)
        times = count[first] or "none"
        assert str(caught.value) == f"element {list(first)} is in {times} of its slices"
    assert right > 500 and wrong > 500


@pytest.mark.parametrize("box", [Box((0,), (5,)), Box((0, 0), (1, 1))])
def test_a_box_outside(box: Box) -> None:
    with pytest.raises(ValueError, match="is not within the tensor's shape"):
        check_tiling([box], (4,))


def test_sides_may_be_huge_and_cuts_many_but_not_too_many() -> None:
    n = 2**61
    check_tiling([Box((0, 0), (1, n)), Box((1, 0), (n, n))], (n, n))
    with pytest.raises(ValueError, match="more than can be checked"):
        check_tiling([full((2,) * 40), Box((0,) * 40, (1,) * 40)], (2,) * 40)
    check_tiling([Box((i,), (i + 1,)) for i in range(50_000)], (50_000,))
    assert MAX_CORNERS >= 2 * 50_000
