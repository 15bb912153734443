import math
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evenkeel.plan.batch import shares, slowest_finish

TIMES = st.one_of(st.integers(1, 6).map(float), st.floats(0.01, 10.0))
PIPELINES = st.lists(st.tuples(TIMES, st.one_of(st.just(0.0), st.floats(0.0, 5.0))), min_size=1, max_size=4)


def every_share(pipelines: int, micro_batches: int, minimum: int) -> Iterator[tuple[int, ...]]:
    if pipelines == 1:
        if micro_batches >= minimum:
            yield (micro_batches,)
        return
    for first in range(minimum, micro_batches + 1):
        for rest in every_share(pipelines - 1, micro_batches - first, minimum):
            yield (first, *rest)


@settings(max_examples=300)
@given(pipelines=PIPELINES, micro_batches=st.integers(0, 9), minimum=st.integers(0, 1))
def test_no_other_share_finishes_earlier(
    pipelines: list[tuple[float, float]], micro_batches: int, minimum: int
) -> None:
    times, offsets = zip(*pipelines, strict=True)
    if micro_batches < minimum * len(times):
        with pytest.raises(ValueError, match="at least 1 each"):
            shares(times, micro_batches, minimum, offsets)
        return
    chosen = shares(times, micro_batches, minimum, offsets)
    assert sum(chosen) == micro_batches
    assert min(chosen) >= minimum
    best = min(slowest_finish(times, c, offsets) for c in every_share(len(times), micro_batches, minimum))
    assert slowest_finish(times, chosen, offsets) == best


@given(pipelines=st.integers(1, 50), micro_batches=st.integers(0, 300))
def test_equal_pipelines_share_evenly_the_first_ones_more(pipelines: int, micro_batches: int) -> None:
    each, more = divmod(micro_batches, pipelines)
    assert shares([0.3] * pipelines, micro_batches) == (each + 1,) * more + (each,) * (pipelines - more)


def test_two_stages_beside_one() -> None:
    """Three workers as pipelines of 2 and 1 stages: the bubble decides between 5 + 3 and 6 + 2."""
    assert shares([0.5, 1.0], 8, 1, [0.5, 0.0]) == (5, 3)


@pytest.mark.parametrize(
    ("times", "offsets"),
    [([], []), ([1.0], [0.0, 0.0]), ([0.0], None), ([math.inf], None), ([math.nan], None), ([1.0], [-1.0])],
)
def test_out_of_range(times: list[float], offsets: list[float] | None) -> None:
    with pytest.raises(ValueError, match=r"pipelines with|must be positive"):
        shares(times, 4, 0, offsets)
