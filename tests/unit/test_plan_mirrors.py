"""Whose mirror is kept by whom: all of the state once, in another failure domain."""

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st
from random_layouts import layouts, models, nodes

from evenkeel.core.ids import NodeId, Version, WorkerId
from evenkeel.core.layout import Layout, Pipeline, Stage, WorkerInfo
from evenkeel.core.model import ModelShape
from evenkeel.core.world import World
from evenkeel.plan.copies import shards_in
from evenkeel.plan.coverage import lost_slices
from evenkeel.plan.mirrors import are_needed, keepers_of, mirrors_of

SIZES = st.lists(st.integers(1, 5), min_size=1, max_size=5).filter(lambda sizes: sum(sizes) > 1)


@given(SIZES, st.randoms())
def test_each_has_a_keeper_on_another_node_where_there_is_one(sizes: list[int], rng: "st.random.Random") -> None:
    node_of = {WorkerId(f"w{n}.{i}"): NodeId(f"n{n}") for n, size in enumerate(sizes) for i in range(size)}
    members = list(node_of)
    rng.shuffle(members)
    keepers = keepers_of(members, node_of)
    assert keepers.keys() == set(members)
    assert all(keeper != worker for worker, keeper in keepers.items())
    if len(sizes) > 1:
        assert all(node_of[keeper] != node_of[worker] for worker, keeper in keepers.items())
    kept = Counter(keepers.values())
    if 2 * max(sizes) <= len(members) or len(sizes) == 1:
        assert set(kept.values()) == {1}
    else:
        elsewhere = len(members) - max(sizes)
        assert max(kept.values()) <= -(-max(sizes) // elsewhere) + 1


@given(data=st.data(), model=models(), node_of=nodes(), copies=st.sampled_from([None, 1, 2]))
def test_snapshots_are_all_of_the_state_and_lie_in_what_their_owner_has(
    data: st.DataObject, model: ModelShape, node_of: dict[WorkerId, NodeId], copies: int | None
) -> None:
    layout = data.draw(layouts(model.depth))
    members = layout.members
    if len(members) < 2:
        return
    infos = tuple(WorkerInfo(w, node_of[w], 1) for w in members)
    nodes_of = tuple((w, node_of[w]) for w in members)
    world = World(1, layout, Version(0, 0), infos, (), nodes_of, 10, "start", "", copies=copies)
    found = mirrors_of(world, model)
    assert not lost_slices(model, [mirroring.shard for mirroring in found.values()])
    whole = shards_in(world, model)
    for worker, mirroring in found.items():
        kept = whole[worker].owned
        assert mirroring.shard.owned is not None
        for start, stop in mirroring.shard.owned:
            assert kept is None or any(a <= start and stop <= b for a, b in kept)


def test_they_are_needed_where_somebody_is_alone() -> None:
    def layout(pipelines: int) -> Layout:
        stages = [Stage(0, 2, (WorkerId(f"w{i}"),)) for i in range(pipelines)]
        return Layout(tuple(Pipeline((stage,), i, i + 1) for i, stage in enumerate(stages)))

    alone = Pipeline((Stage(0, 1, (WorkerId("a"),)), Stage(1, 2, (WorkerId("b"),))), 0, 1)
    assert are_needed(Layout((alone,)), None)
    assert are_needed(layout(3), 1)
    assert not are_needed(layout(3), 2)
    assert not are_needed(layout(2), None)
    assert not are_needed(layout(1), None)
