from collections import Counter
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from evenkeel.plan.samples import sample_indices

PINNED_FIRST = (248, 169, 250, 311, 644, 499, 569, 123)
PINNED_LATER = (794, 60, 442, 463)


def stream(seed: int, steps: int, micro_batch: int, micros: int, size: int) -> list[int]:
    batch = micro_batch * micros
    return [
        i
        for step in range(1, steps + 1)
        for m in range(micros)
        for i in sample_indices(seed, step, m, micro_batch=micro_batch, global_batch=batch, dataset_size=size)
    ]


@given(
    seed=st.integers(0, 2**64 - 1),
    size=st.integers(1, 300),
    micro_batch=st.integers(1, 5),
    micros=st.integers(1, 5),
    epochs=st.integers(1, 3),
)
def test_every_epoch_has_every_sample_once(seed: int, size: int, micro_batch: int, micros: int, epochs: int) -> None:
    steps = -(-size * epochs // (micro_batch * micros))
    order = stream(seed, steps, micro_batch, micros, size)
    for epoch in range(epochs):
        assert sorted(order[epoch * size : (epoch + 1) * size]) == list(range(size))


@given(seed=st.integers(0, 2**64 - 1), size=st.integers(1, 200), step=st.integers(1, 50))
def test_the_cut_into_micro_batches_does_not_change_the_batch(seed: int, size: int, step: int) -> None:
    cuts = [
        [
            i
            for m in range(12 // micro_batch)
            for i in sample_indices(seed, step, m, micro_batch=micro_batch, global_batch=12, dataset_size=size)
        ]
        for micro_batch in (1, 3, 4, 12)
    ]
    assert all(cut == cuts[0] for cut in cuts)


def test_order_is_pinned() -> None:
    """A changed order would make a resumed run another run: these numbers may never change."""
    assert sample_indices(7, 1, 0, micro_batch=8, global_batch=8, dataset_size=1000) == PINNED_FIRST
    assert sample_indices(7, 1001, 1, micro_batch=4, global_batch=8, dataset_size=1000) == PINNED_LATER


def test_epochs_and_seeds_differ_and_look_random() -> None:
    size = 4096
    epochs = [stream(seed, 2, 16, 256, size) for seed in (0, 1)]
    orders = [part for order in epochs for part in (order[:size], order[size:])]
    for i, one in enumerate(orders):
        for other in (list(range(size)), *orders[:i]):
            # Fixed points of a random permutation are Poisson with mean 1.
            assert sum(a == b for a, b in zip(one, other, strict=True)) < 10
        halves = Counter((position < size // 2, index < size // 2) for position, index in enumerate(one))
        assert all(abs(count - size / 4) < 6 * 16 for count in halves.values())  # standard deviation is 16
        steps = [(b - a) % size for a, b in pairwise(one)]
        assert max(Counter(steps).values()) < 12  # Poisson with mean 1: neighbours do not stay neighbours


def test_small_datasets_reach_most_permutations() -> None:
    seen = {tuple(stream(seed, 1, 4, 1, 4)) for seed in range(2000)}
    assert len(seen) == 24


def test_far_positions_of_large_datasets() -> None:
    size = 10**12
    indices = sample_indices(3, 10**9, 0, micro_batch=64, global_batch=4096, dataset_size=size)
    assert len(set(indices)) == 64
    assert all(0 <= i < size for i in indices)
    assert max(indices) > size // 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dataset_size": 0}, "dataset_size is 0"),
        ({"micro_batch": 0}, "micro_batch 0"),
        ({"micro_batch": 3}, "micro_batch 3 does not divide global_batch 8"),
        ({"step": 0}, "steps count from 1"),
        ({"micro": 2}, "micro-batches 0 to 1"),
        ({"micro": -1}, "micro is -1"),
        ({"seed": -1}, "seed is -1"),
        ({"seed": 2**64}, "seed is"),
    ],
)
def test_out_of_range(change: dict[str, int], message: str) -> None:
    arguments = {"seed": 1, "step": 1, "micro": 0, "micro_batch": 4, "global_batch": 8, "dataset_size": 10} | change
    with pytest.raises(ValueError, match=message):
        sample_indices(**arguments)
