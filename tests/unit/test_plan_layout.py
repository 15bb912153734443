from collections.abc import Iterator, Sequence
from itertools import combinations, combinations_with_replacement, pairwise

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from random_layouts import worker

from evenkeel.core.ids import NodeId
from evenkeel.core.layout import Layout, Pipeline, Stage, WorkerInfo, check_layout
from evenkeel.core.model import LayerShape, ModelShape, ParamShape
from evenkeel.plan.batch import slowest_finish
from evenkeel.plan.layout import Infeasible, Planned, Wish, plan_layout


def info(i: int, node: int = 0, device: str = "cpu") -> WorkerInfo:
    return WorkerInfo(worker(i), NodeId(f"n{node}"), 1000 + i, device)


def model_of(*costs: float) -> ModelShape:
    layers = (LayerShape(f"l{i}", (ParamShape(f"p{i}", (8, 4), 0),), cost) for i, cost in enumerate(costs))
    return ModelShape(tuple(layers), tensor_divides=4)


def planned(
    workers: Sequence[WorkerInfo], wish: Wish, model: ModelShape, micro_batches: int, previous: Layout | None = None
) -> Planned:
    plan = plan_layout(workers, wish, model, micro_batches, previous)
    assert isinstance(plan, Planned), plan
    check(plan, workers, wish, model, micro_batches)
    return plan


def check(plan: Planned, workers: Sequence[WorkerInfo], wish: Wish, model: ModelShape, micro_batches: int) -> None:
    """What holds of every plan."""
    layout = plan.layout
    check_layout(layout, model.depth, micro_batches)
    assert sorted([*layout.members, *plan.unused]) == sorted(w.worker_id for w in workers)
    assert list(plan.unused) == [w.worker_id for w in workers if w.worker_id in plan.unused]
    node_of = {w.worker_id: w.node_id for w in workers}
    device_of = {w.worker_id: w.device for w in workers}
    for pipeline in layout.pipelines:
        assert pipeline.share >= 1
        assert wish.pipeline is None or len(pipeline.stages) <= wish.pipeline
        for stage in pipeline.stages:
            assert len({node_of[w] for w in stage.members}) == 1
    assert len({device_of[w] for w in layout.members}) == 1
    assert wish.data is None or len(layout.pipelines) <= wish.data
    depths = [len(p.stages) for p in layout.pipelines]
    assert max(depths) - min(depths) <= 1
    assert len(layout.members) <= wish.max_workers
    assert plan.reason


def shape(layout: Layout) -> list[tuple[int, list[tuple[int, int]]]]:
    return [(p.share, [(s.start, s.stop) for s in p.stages]) for p in layout.pipelines]


def depths(layout: Layout) -> list[int]:
    return [len(p.stages) for p in layout.pipelines]


# --- against every layout -------------------------------------------------------------------------------------------


def compositions(total: int, parts: int) -> Iterator[tuple[int, ...]]:
    for bounds in combinations(range(1, total), parts - 1):
        yield tuple(b - a for a, b in pairwise((0, *bounds, total)))


def finish_of(layout_costs: Sequence[Sequence[float]], counts: Sequence[int]) -> float:
    """`layout_costs` are the costs of the stages of each pipeline."""
    times = [max(stages) for stages in layout_costs]
    return slowest_finish(times, counts, [sum(stages) - max(stages) for stages in layout_costs])


def best_finish(costs: Sequence[float], pipelines: Sequence[int], micro_batches: int) -> float:
    """The smallest slowest finish of pipelines of these depths, over all cuts and all shares."""
    fastest = []
    for depth in pipelines:
        cuts = [pairwise((0, *inner, len(costs))) for inner in combinations(range(1, len(costs)), depth - 1)]
        fastest.append(min(([sum(costs[a:b]) for a, b in cut] for cut in cuts), key=max))
    return min(finish_of(fastest, counts) for counts in compositions(micro_batches, len(pipelines)))


@settings(max_examples=200)
@given(
    costs=st.lists(st.integers(0, 3), min_size=1, max_size=4).filter(any),
    node_sizes=st.lists(st.integers(1, 4), min_size=1, max_size=3).filter(lambda sizes: sum(sizes) <= 6),
    data=st.integers(1, 4),
    pipeline=st.integers(1, 3),
    tensor=st.sampled_from([1, 2]),
    most=st.integers(1, 7),
    micro_batches=st.integers(1, 7),
)
def test_most_workers_then_the_smallest_slowest_finish(
    costs: list[int],
    node_sizes: list[int],
    data: int,
    pipeline: int,
    tensor: int,
    most: int,
    micro_batches: int,
) -> None:
    nodes = [node for node, size in enumerate(node_sizes) for _ in range(size)]
    workers = [info(i, node) for i, node in enumerate(nodes)]
    model = model_of(*map(float, costs))
    units = min(sum(size // tensor for size in node_sizes), most // tensor)
    deepest = min(pipeline, sum(cost > 0 for cost in costs))
    possible = [
        p
        for n in range(1, min(data, micro_batches) + 1)
        for p in combinations_with_replacement(range(1, deepest + 1), n)
        if sum(p) <= units
    ]
    wish = Wish(data, pipeline, tensor, 1, most)
    plan = plan_layout(workers, wish, model, micro_batches, None)
    if not possible:
        assert isinstance(plan, Infeasible)
        return
    assert isinstance(plan, Planned)
    check(plan, workers, wish, model, micro_batches)
    assert len(plan.layout.members) == tensor * max(map(sum, possible))
    equal = [p for p in possible if sum(p) == max(map(sum, possible)) and max(p) - min(p) <= 1]
    chosen = [[sum(costs[s.start : s.stop]) for s in p.stages] for p in plan.layout.pipelines]
    finish = finish_of(chosen, [p.share for p in plan.layout.pipelines])
    assert finish == min(best_finish(costs, p, micro_batches) for p in equal)


# --- stability ------------------------------------------------------------------------------------------------------

WISHES = st.builds(
    Wish,
    data=st.one_of(st.none(), st.integers(1, 4)),
    pipeline=st.one_of(st.none(), st.integers(1, 3)),
    tensor=st.sampled_from([None, 1, 2, 4]),
    min_workers=st.just(1),
    max_workers=st.integers(4, 16),
)
MODELS = st.lists(st.integers(0, 3).map(float), min_size=1, max_size=6).map(lambda costs: model_of(*costs))


@settings(max_examples=300)
@given(data=st.data(), wish=WISHES, model=MODELS, micro_batches=st.integers(1, 12))
def test_who_is_still_there_keeps_the_place(
    data: st.DataObject, wish: Wish, model: ModelShape, micro_batches: int
) -> None:
    nodes = data.draw(st.lists(st.integers(0, 2), min_size=4, max_size=14))
    workers = [info(i, node) for i, node in enumerate(nodes)]
    first = plan_layout(workers, wish, model, micro_batches, None)
    assume(isinstance(first, Planned))
    assert isinstance(first, Planned)
    before = first.layout
    check(first, workers, wish, model, micro_batches)
    again = planned([w for w in workers if w.worker_id in before.places], wish, model, micro_batches, before)
    assert again.layout == before

    dead = data.draw(st.sets(st.sampled_from(before.members)))
    members = [w for w in workers if w.worker_id in before.places and w.worker_id not in dead]
    spares = [info(50 + i, node) for i, node in enumerate(data.draw(st.lists(st.integers(0, 3), max_size=5)))]
    spares = [w for w in workers if w.worker_id not in before.places] + spares
    second = plan_layout([*members, *spares], wish, model, micro_batches, before)
    if isinstance(second, Infeasible):
        return
    after = second.layout
    check(second, [*members, *spares], wish, model, micro_batches)
    if len(after.members) == len(before.members) and after.tensor == before.tensor:
        assert shape(after) == shape(before), "the same number of places is the same shape"
    if shape(after) == shape(before):
        for w in members:
            place = before.places[w.worker_id]
            stage = before.pipelines[place.pipeline].stages[place.stage]
            if dead.isdisjoint(stage.members):
                assert after.places[w.worker_id] == place, "a whole TP group stays where it is"
            elif w.worker_id in after.places and after.places[w.worker_id] != place:
                seats = after.pipelines[place.pipeline].stages[place.stage].members
                assert set(seats).isdisjoint(stage.members), "or its group could not be filled on its node"


@given(data=st.data(), wish=WISHES, model=MODELS, micro_batches=st.integers(1, 12))
def test_spares_take_exactly_the_places_of_the_dead(
    data: st.DataObject, wish: Wish, model: ModelShape, micro_batches: int
) -> None:
    """As many spares on its node as a node has lost: the same layout with the names of the dead replaced."""
    wish = Wish(wish.data, wish.pipeline, wish.tensor, 1, wish.max_workers)
    workers = [info(i, i // 4) for i in range(12)]
    before = planned(workers, wish, model, micro_batches).layout
    node_of = {w.worker_id: int(w.node_id[1:]) for w in workers}
    dead = sorted(data.draw(st.sets(st.sampled_from(before.members))))
    spares = [info(50 + i, node_of[w]) for i, w in enumerate(dead)]
    here = [w for w in workers if w.worker_id in before.places and w.worker_id not in dead]
    after = planned([*here, *spares], wish, model, micro_batches, before).layout
    assert shape(after) == shape(before)
    kept = [(old, new) for old, new in zip(before.members, after.members, strict=True) if old not in dead]
    assert all(old == new for old, new in kept)


def test_a_spare_takes_rank_and_share() -> None:
    model, wish = model_of(0, 1, 1, 1, 1, 1), Wish(2, 2, None, 2, 5)
    workers = [info(i, i // 2) for i in range(5)]
    before = planned(workers, wish, model, 8)
    assert before.unused == (worker(4),)
    after = planned([workers[0], *workers[2:]], wish, model, 8, before.layout)
    assert after.layout.places[worker(4)] == before.layout.places[worker(1)]
    assert shape(after.layout) == shape(before.layout)
    assert "w0004 takes the place of w0001 (rank 1)" in after.reason


def test_shrinking_moves_no_more_than_it_must() -> None:
    """2 x 2 loses a worker: three keep all that they have, one of them takes on the other half too."""
    model, wish = model_of(1, 1, 1, 1), Wish(2, 2, None, 2, 4)
    workers = [info(i) for i in range(4)]
    before = planned(workers, wish, model, 8).layout
    for lost in range(4):
        plan = planned([w for i, w in enumerate(workers) if i != lost], wish, model, 8, before)
        assert depths(plan.layout) == [2, 1]
        assert [p.share for p in plan.layout.pipelines] == [5, 3]
        kept = [w for w in plan.layout.members if plan.layout.shard(w) == before.shard(w)]
        assert len(kept) == 2
        assert "another shape than before, 2 workers keep their layers" in plan.reason
        grown = planned([*(w for i, w in enumerate(workers) if i != lost), info(9)], wish, model, 8, plan.layout)
        assert shape(grown.layout) == shape(before)
        assert sum(grown.layout.shard(w) == plan.layout.shard(w) for w in plan.layout.members) == 2


def test_a_smaller_tensor_degree_keeps_parts_in_place() -> None:
    model = model_of(1, 1)
    workers = [info(i) for i in range(4)]
    four = planned(workers, Wish(1, 1, 4, 1, 4), model, 2).layout
    two = planned(workers, Wish(1, 2, 2, 1, 4), model, 2, four).layout
    again = planned(workers, Wish(1, 1, 4, 1, 4), model, 2, two).layout
    for layout, old in ((two, four), (again, two)):
        for w in layout.members:
            place, was = layout.places[w], old.places[w]
            low, high = place.tp / layout.tensor, (place.tp + 1) / layout.tensor
            assert low < (was.tp + 1) / old.tensor
            assert was.tp / old.tensor < high


# --- examples -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("here", "data", "pipeline", "micros", "expected"),
    [
        (4, 2, 2, 8, [2, 2]),
        (5, 2, 2, 8, [2, 2]),  # the fifth is a spare
        (3, 2, 2, 8, [2, 1]),
        (2, 2, 2, 8, [1, 1]),
        (1, 2, 2, 8, [1]),
        (5, None, None, 8, [1] * 5),
        (5, None, None, 3, [2, 2, 1]),  # not more pipelines than micro-batches
        (5, None, 2, 8, [2, 2, 1]),
        (4, None, 2, 8, [2, 2]),
        (5, 2, None, 8, [3, 2]),
        (9, 1, 9, 8, [4]),  # not more stages than layers with work
        (9, 1, None, 8, [4]),
    ],
)
def test_shapes(here: int, data: int | None, pipeline: int | None, micros: int, expected: list[int]) -> None:
    plan = planned([info(i) for i in range(here)], Wish(data, pipeline, None, 1, 16), model_of(0, 1, 1, 1, 1), micros)
    assert depths(plan.layout) == expected


def test_fewer_pipelines_where_their_cuts_are_better() -> None:
    """Three layers make three equal stages but not two: 2 x 3 is done at 8.0, 3 x 2 at 9.0."""
    plan = planned([info(i) for i in range(6)], Wish(3, 3, None, 1, 9), model_of(1, 1, 1), 12)
    assert depths(plan.layout) == [3, 3]


def test_more_pipelines_where_it_makes_no_difference() -> None:
    """Both are done at 2.0 with three micro-batches; two pipelines hold everything twice."""
    assert depths(planned([info(0), info(1)], Wish(3, 2, None, 1, 9), model_of(1, 1), 3).layout) == [1, 1]


def test_of_two_broken_tensor_groups_one_is_made_whole() -> None:
    """Each has lost a member and nobody stands by: a survivor of one fills the other, with its TP rank."""
    workers, wish, model = [info(i) for i in range(4)], Wish(2, 1, 2, 2, 4), model_of(1, 1)
    before = planned(workers, wish, model, 4).layout
    after = planned([workers[1], workers[2]], wish, model, 4, before).layout
    assert after.members == (worker(2), worker(1))
    assert after.places[worker(1)].tp == before.places[worker(1)].tp


def test_pipelines_lie_within_nodes_at_first() -> None:
    workers = [info(i, i % 2) for i in range(4)]
    layout = planned(workers, Wish(2, 2, None, 1, 4), model_of(1, 1), 4).layout
    assert layout.members == (worker(0), worker(2), worker(1), worker(3))


def test_the_members_device_stays() -> None:
    wish, model = Wish(2, 1, None, 1, 2), model_of(1, 1)
    mixed = [info(0), info(1, 0, "cuda"), info(2, 0, "cuda")]
    before = planned(mixed, wish, model, 4)
    assert before.unused == (worker(0),)
    after = planned([mixed[2], mixed[0], info(3), info(4)], wish, model, 4, before.layout)
    assert after.layout.members == (worker(2),)


def test_tensor_degree_stays_when_nothing_is_said() -> None:
    workers = [info(i) for i in range(4)]
    before = planned(workers, Wish(None, None, 2, 1, 4), model_of(1, 1), 4).layout
    assert planned(workers[:3], Wish(None, None, None, 1, 4), model_of(1, 1), 4, before).layout.tensor == 2


def test_without_any_cost_all_layers_weigh_the_same() -> None:
    layout = planned([info(0), info(1)], Wish(1, 2, None, 1, 2), model_of(0, 0, 0, 0), 2).layout
    assert [(s.start, s.stop) for s in layout.pipelines[0].stages] == [(0, 2), (2, 4)]


@pytest.mark.parametrize(
    ("workers", "wish", "reason"),
    [
        ([], Wish(2, 2, None, 1, 4), "waits for 1 more worker: 1 are needed, 0 are here"),
        ([info(0)], Wish(2, 2, None, 2, 4), "waits for 1 more worker: 2 are needed, 1 are here"),
        (
            [info(0, 0), info(1, 1)],
            Wish(1, 1, 2, 1, 4),
            "waits for 2 more workers: 2 are needed, 2 are here, which form 0 TP groups of 2 within a node",
        ),
        (
            [info(0), info(1, 0, "cuda")],
            Wish(2, 1, 1, 2, 2),
            "waits for 1 more worker: 2 are needed, 2 are here, 1 of them of one kind of device",
        ),
        ([info(0)], Wish(1, 1, 3, 1, 4), "TP degree 3 does not divide 4 (heads, widths): no worker helps"),
        ([info(0)], Wish(1, 1, 4, 1, 2), "max_workers 2 does not hold one TP group of 4: no worker helps"),
    ],
)
def test_what_is_waited_for(workers: list[WorkerInfo], wish: Wish, reason: str) -> None:
    assert plan_layout(workers, wish, model_of(1, 1), 4, None) == Infeasible(reason)


def test_more_workers_than_there_can_be_places_are_not_waited_for() -> None:
    assert depths(planned([info(0)], Wish(None, None, None, 3, 4), model_of(1), 1).layout) == [1]


def test_reason_says_what_and_why() -> None:
    plan = planned([info(i) for i in range(3)], Wish(2, 2, None, 1, 4), model_of(1, 1), 8)
    assert plan.reason == (
        "1 pipeline of 2 stages and 1 pipeline of 1 stage, 3 to 5 micro-batches each: "
        "3 of 3 workers, everybody who is here, in at most 2 pipelines of 2 stages"
    )


@settings(max_examples=300)
@given(data=st.data(), wish=WISHES, model=MODELS, micro_batches=st.integers(1, 12))
def test_after_tp_groups_that_reached_over_nodes_they_do_not(
    data: st.DataObject, wish: Wish, model: ModelShape, micro_batches: int
) -> None:
    nodes = data.draw(st.lists(st.integers(0, 2), min_size=4, max_size=14))
    workers = [info(i, node) for i, node in enumerate(nodes)]
    together = plan_layout([info(i) for i in range(len(nodes))], wish, model, micro_batches, None)
    assume(isinstance(together, Planned))
    assert isinstance(together, Planned)
    plan = plan_layout(workers, wish, model, micro_batches, together.layout)
    if isinstance(plan, Planned):
        check(plan, workers, wish, model, micro_batches)


def test_a_previous_layout_of_another_making_gives_way() -> None:
    """A layout that the planner would not choose: who can stays, shares and cuts are the planner's."""
    stages = (Stage(0, 1, (worker(0),)), Stage(1, 4, (worker(1),)))
    before = Layout((Pipeline(stages, 0, 8),))
    after = planned([info(1), info(0)], Wish(1, 2, None, 1, 2), model_of(1, 1, 1, 1), 8, before).layout
    assert after.members == (worker(0), worker(1))


@pytest.mark.parametrize(
    "numbers", [(0, 1, 1, 1, 1), (1, 0, 1, 1, 1), (1, 1, 0, 1, 1), (1, 1, 1, 0, 1), (1, 1, 1, 2, 1)]
)
def test_bad_wishes(numbers: tuple[int, int, int, int, int]) -> None:
    with pytest.raises(ValueError, match=r"at least 1|above max_workers"):
        Wish(*numbers)


def test_no_micro_batches() -> None:
    with pytest.raises(ValueError, match="0 micro-batches"):
        plan_layout([info(0)], Wish(1, 1, 1, 1, 1), model_of(1), 0, None)
