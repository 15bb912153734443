"""Layers cut again for workers of unequal speed: against trying all cuts."""

from collections.abc import Sequence
from itertools import combinations, pairwise

from hypothesis import given, settings
from hypothesis import strategies as st

from evenkeel.plan.cuts import Cuts
from evenkeel.plan.recut import recut

positive = st.one_of(st.integers(1, 9).map(float), st.floats(1e-3, 1e3))
cost = st.one_of(st.just(0.0), positive)


def all_cuts(depth: int, stages: int) -> list[Cuts]:
    return [tuple(pairwise((0, *bounds, depth))) for bounds in combinations(range(1, depth), stages - 1)]


def slowest(costs: Sequence[float], paces: Sequence[float], cuts: Cuts) -> float:
    return max(pace * sum(costs[start:stop]) for pace, (start, stop) in zip(paces, cuts, strict=True))


@st.composite
def pipelines(draw: st.DrawFn) -> tuple[list[float], list[float], Cuts]:
    costs = draw(st.lists(cost, min_size=1, max_size=9))
    paces = draw(st.lists(positive, min_size=1, max_size=min(4, len(costs))))
    return costs, paces, draw(st.sampled_from(all_cuts(len(costs), len(paces))))


@settings(max_examples=1000)
@given(case=pipelines())
def test_no_cuts_are_faster(case: tuple[list[float], list[float], Cuts]) -> None:
    costs, paces, now = case
    found = recut(costs, paces, now)
    assert found is not None
    assert [start for start, _ in found][1:] == [stop for _, stop in found][:-1]
    assert (found[0][0], found[-1][1]) == (0, len(costs))
    assert all(start < stop for start, stop in found)
    best = min(slowest(costs, paces, cuts) for cuts in all_cuts(len(costs), len(paces)))
    assert slowest(costs, paces, found) <= best * (1 + 1e-9)


@settings(max_examples=1000)
@given(case=pipelines(), data=st.data())
def test_memory_limits_are_hard(case: tuple[list[float], list[float], Cuts], data: st.DataObject) -> None:
    costs, paces, now = case
    sizes = data.draw(st.lists(st.integers(0, 5), min_size=len(costs), max_size=len(costs)))
    room = data.draw(st.lists(st.integers(0, 15), min_size=len(paces), max_size=len(paces)))

    def fits(stage: int, start: int, stop: int) -> bool:
        return sum(sizes[start:stop]) <= room[stage]

    fitting = [cuts for cuts in all_cuts(len(costs), len(paces)) if all(fits(i, *cut) for i, cut in enumerate(cuts))]
    found = recut(costs, paces, now, fits)
    assert (found is None) == (not fitting)
    if found is not None:
        assert found in fitting
        best = min(slowest(costs, paces, cuts) for cuts in fitting)
        assert slowest(costs, paces, found) <= best * (1 + 1e-9)


@settings(max_examples=300)
@given(case=pipelines())
def test_cuts_that_are_best_stay(case: tuple[list[float], list[float], Cuts]) -> None:
    costs, paces, _ = case
    best = min(slowest(costs, paces, cuts) for cuts in all_cuts(len(costs), len(paces)))
    for cuts in all_cuts(len(costs), len(paces)):
        if slowest(costs, paces, cuts) <= best:
            assert recut(costs, paces, cuts) == cuts


def test_only_what_must_move_does() -> None:
    now = ((0, 4), (4, 8), (8, 12))
    assert recut((1.0,) * 12, (1.0, 1.0, 1.0), now) == now
    assert recut((1.0,) * 12, (1.0, 3.0, 1.0), now) == ((0, 4), (4, 6), (6, 12))
    assert recut((1.0,) * 12, (1.0, 1.0, 2.0), now) == ((0, 5), (5, 10), (10, 12))


@settings(max_examples=300)
@given(case=pipelines(), worth=st.sampled_from([0.5, 0.9, 0.98]))
def test_cuts_are_kept_unless_others_are_worth_it(case: tuple[list[float], list[float], Cuts], worth: float) -> None:
    costs, paces, now = case
    best = min(slowest(costs, paces, cuts) for cuts in all_cuts(len(costs), len(paces)))
    found = recut(costs, paces, now, worth=worth)
    if best > worth * slowest(costs, paces, now) * (1 + 1e-9):
        assert found == now
    elif best < worth * slowest(costs, paces, now) * (1 - 1e-9):
        assert found is not None and slowest(costs, paces, found) <= best * (1 + 1e-9)
