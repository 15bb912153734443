from itertools import combinations, pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from evenkeel.plan.cuts import Cuts, most_stages, slowest_stage, stage_cuts

COSTS = st.lists(st.one_of(st.integers(0, 5).map(float), st.floats(0.0, 3.0)), min_size=1, max_size=8).map(tuple)


def every_cut(depth: int, stages: int) -> list[Cuts]:
    inner = combinations(range(1, depth), stages - 1)
    return [tuple(pairwise((0, *bounds, depth))) for bounds in inner]


@given(costs=COSTS, data=st.data())
def test_no_other_cut_has_a_faster_slowest_stage(costs: tuple[float, ...], data: st.DataObject) -> None:
    stages = data.draw(st.integers(1, len(costs)))
    cuts = stage_cuts(costs, stages)
    assert cuts in every_cut(len(costs), stages)
    assert slowest_stage(costs, cuts) == pytest.approx(
        min(slowest_stage(costs, other) for other in every_cut(len(costs), stages)), rel=1e-9
    )


@given(costs=st.lists(st.integers(0, 4).map(float), min_size=1, max_size=8).map(tuple), data=st.data())
def test_every_stage_has_work(costs: tuple[float, ...], data: st.DataObject) -> None:
    stages = data.draw(st.integers(1, most_stages(costs)))
    if any(costs):
        assert all(sum(costs[start:stop]) > 0 for start, stop in stage_cuts(costs, stages))


def test_the_other_stages_are_even_too() -> None:
    assert stage_cuts((5.0, 1.0, 1.0, 1.0, 1.0), 3) == ((0, 1), (1, 3), (3, 5))


def test_the_slowest_stage_comes_before_evenness() -> None:
    """Stages of 6, 2 and 3 are more even than 1, 5 and 5, but slower."""
    assert stage_cuts((1.0, 5.0, 2.0, 3.0), 3) == ((0, 1), (1, 2), (2, 4))


def test_an_embedding_costs_nothing_and_stays_with_its_neighbour() -> None:
    assert stage_cuts((0.0, 1.0, 1.0, 1.0, 1.0), 4) == ((0, 2), (2, 3), (3, 4), (4, 5))


@pytest.mark.parametrize(("costs", "stages"), [((1.0,), 2), ((1.0,), 0), ((1.0, -1.0), 1)])
def test_out_of_range(costs: tuple[float, ...], stages: int) -> None:
    with pytest.raises(ValueError, match=r"do not make|less than nothing"):
        stage_cuts(costs, stages)
