from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from evenkeel.core.batches import batches


@given(sizes=st.lists(st.integers(0, 9), max_size=30), most=st.integers(1, 20))
def test_all_items_in_order_and_no_batch_too_large_or_too_small(sizes: list[int], most: int) -> None:
    found = list(batches(sizes, lambda size: size, most))
    assert [size for batch in found for size in batch] == sizes
    assert all(sum(batch) <= most or len(batch) == 1 for batch in found)
    assert all(sum(batch) + after[0] > most for batch, after in pairwise(found))
