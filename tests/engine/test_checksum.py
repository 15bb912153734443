"""The checksum of a copy: against a dumb one, and what it must see."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from evenkeel.engine import checksum as module
from evenkeel.engine.checksum import BLOCK, COLUMNS, RESULT, checksum

SIZES = st.one_of(st.integers(1, 300), st.integers(COLUMNS - 2, COLUMNS + 2), st.integers(1, 6 * COLUMNS))


def numbers(size: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def wrapped(value: int, bits: int) -> int:
    """As a signed integer of so many bits."""
    value %= 1 << bits
    return value - (1 << bits) if value >> (bits - 1) else value


def weight(index: int) -> int:
    x = wrapped((index + 1) * 0x9E3779B97F4A7C15, 64)
    x = wrapped((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9, 64)
    x = wrapped((x ^ (x >> 27)) * 0x94D049BB133111EB, 64)
    return x ^ (x >> 31)


def dumb(data: Tensor) -> int:
    words = data.view(torch.int32).tolist()
    columns, rows = [0] * COLUMNS, [0] * -(-len(words) // COLUMNS)
    for i, word in enumerate(words):
        columns[i % COLUMNS] += word
        rows[i // COLUMNS] += word
    total = sum(wrapped(s, 32) * (weight(i) | 1) for i, s in enumerate(columns))
    total += sum(wrapped(s, 32) * (weight(COLUMNS + i) & ~1) for i, s in enumerate(rows))
    return total % RESULT + 1


@settings(max_examples=40, deadline=None)
@given(size=SIZES, seed=st.integers(0, 9), double=st.booleans())
def test_against_a_dumb_one(size: int, seed: int, double: bool) -> None:
    data = numbers(size, seed, torch.float64 if double else torch.float32)
    assert checksum([data]) == dumb(data)


@settings(max_examples=60, deadline=None)
@given(size=SIZES, cuts=st.lists(st.integers(0, 6 * COLUMNS), max_size=6), block=st.sampled_from([1, 2, 256]))
def test_it_depends_on_the_sequence_alone(size: int, cuts: list[int], block: int) -> None:
    data = numbers(size)
    expected = checksum([data])
    bounds = [0, *sorted(min(cut, size) for cut in cuts), size]
    pieces = [data[a:b].clone() for a, b in pairwise(bounds)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "BLOCK", BLOCK | {"cpu": block * COLUMNS})
        assert checksum(pieces) == expected


@settings(max_examples=300, deadline=None)
@given(data=st.data(), size=SIZES)
def test_a_flipped_bit_is_always_seen(data: st.DataObject, size: int) -> None:
    before = numbers(size)
    after = before.clone()
    at, bit = data.draw(st.integers(0, size - 1)), data.draw(st.integers(0, 31))
    after.view(torch.int32)[at] ^= wrapped(1 << bit, 32)
    assert 1 <= checksum([before]) != checksum([after]) <= RESULT < 2**53


@settings(max_examples=200, deadline=None)
@given(data=st.data(), size=st.integers(2, 4 * COLUMNS))
def test_swapped_elements_are_seen(data: st.DataObject, size: int) -> None:
    before = numbers(size)
    i, j = data.draw(st.lists(st.integers(0, size - 1), min_size=2, max_size=2, unique=True))
    after = before.clone()
    after[i], after[j] = before[j], before[i]
    assert (checksum([before]) == checksum([after])) == bool(before[i] == before[j])


def test_nothing_has_a_checksum_too() -> None:
    assert checksum([]) == checksum([numbers(0)]) == RESULT
