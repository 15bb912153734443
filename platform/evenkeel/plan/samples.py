"""The order of samples: a pure function of seed and position, so that there is no data-loader state to save.

Each epoch is a permutation of the dataset that is evaluated at a single position in O(1) time and memory: a
Feistel network over Z_a x Z_b with a*b >= n, walked until it is back inside the n samples (Black and Rogaway,
"Ciphers with Arbitrary Finite Domains", 2002: generalised Feistel and cycle walking).
"""

from functools import lru_cache
from math import isqrt

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
_ROUNDS = 8


def sample_indices(
    seed: int, step: int, micro: int, *, micro_batch: int, global_batch: int, dataset_size: int
) -> tuple[int, ...]:
    """Dataset indices of micro-batch `micro` of step `step`: the same for everyone, whatever the layout.

    Step s takes the global sample positions (s-1)*global_batch to s*global_batch, micro-batch m of it those from
    m*micro_batch on. Position p is the (p mod n)-th sample of epoch p // n, for n = dataset_size: each epoch has
    each sample once, in an order of its own, and a micro-batch may reach over the end of one.

    Args:
        seed: 0 to 2**64 - 1.
        step: counts from 1.
        micro: counts from 0, below global_batch // micro_batch.

    Returns:
        `micro_batch` indices from 0 to dataset_size - 1.

    Raises:
        ValueError: if an argument is out of range, or micro_batch does not divide global_batch.
    """
    if dataset_size < 1:
        raise ValueError(f"dataset_size is {dataset_size}; at least 1 sample is needed")
    if micro_batch < 1 or global_batch < 1 or global_batch % micro_batch:
        raise ValueError(f"micro_batch {micro_batch} does not divide global_batch {global_batch} into whole parts")
    if step < 1:
        raise ValueError(f"step is {step}; steps count from 1")
    if not 0 <= micro < global_batch // micro_batch:
        raise ValueError(f"micro is {micro}; a step has micro-batches 0 to {global_batch // micro_batch - 1}")
    if not 0 <= seed <= _MASK:
        raise ValueError(f"seed is {seed}; it must lie within 0 and 2**64 - 1")
    first = (step - 1) * global_batch + micro * micro_batch
    return tuple(
        _permute(position % dataset_size, dataset_size, _round_keys(seed, position // dataset_size))
        for position in range(first, first + micro_batch)
    )


def _permute(index: int, size: int, keys: tuple[int, ...]) -> int:
    """Where `index` goes in the permutation of range(size) that `keys` name."""
    a = isqrt(size - 1) + 1
    b = -(-size // a)  # a*b < size + a, so that walking is rare
    while True:
        left, right = divmod(index, b)
        for i in range(0, _ROUNDS, 2):
            left = (left + _mix(right ^ keys[i])) % a
            right = (right + _mix(left ^ keys[i + 1])) % b
        index = left * b + right
        if index < size:
            return index


@lru_cache(maxsize=64)
def _round_keys(seed: int, epoch: int) -> tuple[int, ...]:
    state = _mix(_mix(seed + _GOLDEN) + epoch)
    return tuple(_mix(state + i * _GOLDEN) for i in range(1, _ROUNDS + 1))


def _mix(x: int) -> int:
    """The finaliser of SplitMix64 (Steele, Lea and Flood, 2014): a bijection of 64-bit integers."""
    x &= _MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK
    return x ^ (x >> 31)
