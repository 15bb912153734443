import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from evenkeel.core.boxes import Box, cut, full

SHAPE = (4, 3, 5)


@st.composite
def boxes(draw: st.DrawFn, dims: int = 3) -> Box:
    sides = [sorted((draw(st.integers(0, n)), draw(st.integers(0, n)))) for n in SHAPE[:dims]]
    return Box(tuple(a for a, _ in sides), tuple(b for _, b in sides))


def mask(*several: Box) -> np.ndarray[tuple[int, ...], np.dtype[np.int64]]:
    """How many of the boxes each element lies in."""
    array = np.zeros(SHAPE, int)
    for box in several:
        array[box.slices] += 1
    return array


@given(one=boxes(), other=boxes())
def test_against_masks(one: Box, other: Box) -> None:
    both = mask(one) * mask(other)
    common = one.intersect(other)
    assert (common is None) == (not both.any())
    if common is not None:
        np.testing.assert_array_equal(mask(common), both)
        assert one.contains(common)
        assert other.contains(common)
    rest = one.subtract(other)
    np.testing.assert_array_equal(mask(*rest), mask(one) - both)
    if common is not None:
        assert len(rest) <= 2 * len(SHAPE)
        assert all(part.size for part in rest)
    assert one.size == mask(one).sum()
    assert one.shape == mask(one)[one.slices].shape
    if one.size and other.size:
        assert one.contains(other) == bool((mask(one) >= mask(other)).all())


@given(outer=boxes(), inner=boxes())
def test_within_indexes_a_stored_box(outer: Box, inner: Box) -> None:
    common = outer.intersect(inner)
    whole = np.arange(np.prod(SHAPE)).reshape(SHAPE)
    if common is not None:
        np.testing.assert_array_equal(whole[outer.slices][common.within(outer)], whole[common.slices])


@given(dim=st.sampled_from([None, 0, 1, 2]), parts=st.sampled_from([1, 2, 4]))
def test_cuts_cover_once(dim: int | None, parts: int) -> None:
    if dim is not None and SHAPE[dim] % parts:
        with pytest.raises(ValueError, match=f"dimension {dim} of shape"):
            cut(SHAPE, dim, 0, parts)
        return
    pieces = [cut(SHAPE, dim, part, parts) for part in range(parts)]
    assert len({piece.size for piece in pieces}) == 1
    np.testing.assert_array_equal(mask(*pieces), mask(full(SHAPE)) * (parts if dim is None else 1))


def test_scalars() -> None:
    scalar = full(())
    assert scalar.size == 1
    assert scalar.intersect(scalar) == scalar
    assert scalar.subtract(scalar) == ()
    assert scalar.contains(scalar)


@pytest.mark.parametrize(("start", "stop"), [((0,), (1, 2)), ((2,), (1,)), ((-1,), (1,)), ((), (1,))])
def test_not_a_box(start: tuple[int, ...], stop: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="not a box"):
        Box(start, stop)
