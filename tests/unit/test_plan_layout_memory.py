"""Layouts under memory limits, against a look at every possible cut."""

from collections.abc import Mapping, Sequence
from itertools import combinations, pairwise

from hypothesis import given
from hypothesis import strategies as st

from evenkeel.core.ids import NodeId, WorkerId
from evenkeel.core.layout import Layout, Pipeline, Stage, WorkerInfo
from evenkeel.core.model import LayerShape, ModelShape, ParamShape
from evenkeel.plan.layout import Planned, Wish, plan_layout
from evenkeel.plan.speeds import Fits, Speeds

Rooms = Mapping[WorkerId, int]
"""How many layers each has the memory for."""


def worker(i: int) -> WorkerInfo:
    return WorkerInfo(WorkerId(f"w{i}"), NodeId(f"n{i}"), 100 + i)


def room_of(rooms: Rooms, layout: Layout) -> Fits:
    def fits(pipeline: int, stage: int, start: int, stop: int) -> bool:
        [member] = layout.pipelines[pipeline].stages[stage].members
        return stop - start <= rooms[member]

    return fits


def fits(rooms: Rooms, layout: Layout) -> bool:
    return all(s.stop - s.start <= rooms[s.members[0]] for p in layout.pipelines for s in p.stages)


def could_fit(rooms: Rooms, members: Sequence[WorkerId], depth: int) -> bool:
    """Whether any cuts of `depth` layers give these stages, in this order, no more than they have room for."""
    return any(
        all(stop - start <= rooms[member] for member, (start, stop) in zip(members, pairwise(bounds), strict=True))
        for inner in combinations(range(1, depth), len(members) - 1)
        for bounds in [(0, *inner, depth)]
    )


def plan(
    rooms: Rooms, wish: Wish, depth: int, previous: Layout | None = None, paces: Mapping[WorkerId, float] | None = None
) -> Planned:
    model = ModelShape(tuple(LayerShape(f"l{i}", (ParamShape(f"p{i}", (4, 4)),), 1.0) for i in range(depth)))
    speeds = None if paces is None else Speeds((1.0,) * depth, paces)
    workers = [worker(i) for i in range(len(rooms))]
    planned = plan_layout(workers, wish, model, 12, previous, speeds, lambda layout: room_of(rooms, layout))
    assert isinstance(planned, Planned)
    return planned


@given(
    limits=st.lists(st.integers(0, 6), min_size=1, max_size=6),
    depth=st.integers(1, 6),
    data=st.integers(1, 3),
    pipeline=st.integers(1, 3),
    measured=st.booleans(),
)
def test_what_can_fit_does(limits: list[int], depth: int, data: int, pipeline: int, measured: bool) -> None:
    rooms = {WorkerId(f"w{i}"): limit for i, limit in enumerate(limits)}
    paces = {w: 1.0 + i % 3 for i, w in enumerate(rooms)} if measured else None
    planned = plan(rooms, Wish(data, pipeline, 1, 1, 6), depth, paces=paces)
    assert planned.fits is fits(rooms, planned.layout)
    if not planned.fits:
        groups = [[stage.members[0] for stage in p.stages] for p in planned.layout.pipelines]
        assert not all(could_fit(rooms, members, depth) for members in groups)


@given(limits=st.lists(st.integers(1, 4), min_size=4, max_size=4))
def test_cuts_of_before_are_kept_if_they_fit(limits: list[int]) -> None:
    rooms = {WorkerId(f"w{i}"): limit for i, limit in enumerate(limits)}
    names = list(rooms)
    previous = Layout(
        (
            Pipeline((Stage(0, 3, (names[0],)), Stage(3, 4, (names[1],))), 0, 9),
            Pipeline((Stage(0, 2, (names[2],)), Stage(2, 4, (names[3],))), 9, 12),
        )
    )
    planned = plan(rooms, Wish(2, 2, 1, 4, 4), 4, previous, dict.fromkeys(names, 1.0))
    if fits(rooms, previous):
        assert planned.layout == previous
    elif could_fit(rooms, names[:2], 4) and could_fit(rooms, names[2:], 4):
        assert planned.fits
        assert planned.layout.places.keys() == previous.places.keys()


def test_deeper_pipelines_where_shallow_ones_do_not_fit() -> None:
    rooms = {WorkerId(f"w{i}"): 2 for i in range(2)}
    planned = plan(rooms, Wish(2, 2, 1, 1, 4), 4)
    assert [len(p.stages) for p in planned.layout.pipelines] == [2]
    assert planned.fits
