from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from random_layouts import layouts, models, nodes, worker

from evenkeel.core.boxes import Box
from evenkeel.core.ids import NodeId, WorkerId
from evenkeel.core.layout import Layout, Pipeline, Stage, sync_groups
from evenkeel.core.model import LayerShape, ModelShape, ParamShape
from evenkeel.plan.copies import place_copies, shards
from evenkeel.plan.flat import flat_boxes
from evenkeel.plan.reshard import reshard
from evenkeel.plan.state import KINDS, slices

ALIGNMENT = 4


@given(
    corners=st.lists(st.tuples(st.integers(0, 3), st.integers(1, 4)), max_size=4),
    ends=st.tuples(st.integers(0, 256), st.integers(0, 256)),
)
def test_a_flat_range_as_boxes(corners: list[tuple[int, int]], ends: tuple[int, int]) -> None:
    """Against the numbers of the elements themselves, in order, in at most 2d - 1 boxes."""
    box = Box(tuple(a for a, _ in corners), tuple(a + side for a, side in corners))
    start, stop = (min(end, box.size) for end in sorted(ends))
    numbers = np.arange(box.size).reshape(box.shape)
    found = list(flat_boxes(box, start, stop))
    got = [number for piece in found for number in numbers[piece.within(box)].ravel().tolist()]
    assert got == list(range(start, stop))
    assert len(found) <= max(1, 2 * len(corners) - 1)


@settings(max_examples=150)
@given(data=st.data(), model=models(), node_of=nodes(), copies=st.integers(1, 4), bucket=st.integers(1, 40))
def test_every_element_has_its_owners(
    data: st.DataObject, model: ModelShape, node_of: dict[WorkerId, NodeId], copies: int, bucket: int
) -> None:
    """Element by element: as many owners as asked for, each part and each holding as counted on arrays."""
    layout = data.draw(layouts(model.depth))
    placed = place_copies(layout, model, copies, node_of, ALIGNMENT, data.draw(st.sampled_from([None, bucket])))
    assert [o.group for o in placed.groups] == list(sync_groups(layout, model))
    for ownership in placed.groups:
        members = ownership.group.members
        r = min(copies, len(members))
        owned = {w: np.zeros(ownership.size, int) for w in members}
        for part in ownership.parts:
            assert len(part.owners) == len(set(part.owners)) == r
            assert part.start % ALIGNMENT == part.stop % ALIGNMENT == 0
            for w in part.owners:
                owned[w][part.start : part.stop] += 1
        assert (sum(owned.values()) == r).all()
        for w in members:
            ranges = np.zeros(ownership.size, int)
            for start, stop in ownership.ranges()[w]:
                ranges[start:stop] += 1
            np.testing.assert_array_equal(ranges, owned[w])
            even = r * ownership.size / len(members)
            assert abs(owned[w].sum() - even) <= r * len(ownership.units) * ALIGNMENT
        assert [b for a, b in ownership.units[:-1]] == [a for a, b in ownership.units[1:]]
        assert (ownership.units[0][0], ownership.units[-1][1]) == (0, ownership.size)

    held = {w: slices(model, shard, ALIGNMENT) for w, shard in shards(placed, layout, model, ALIGNMENT).items()}
    counted: dict[str, np.ndarray] = {
        f"{kind}/{p.name}": np.zeros(p.shape, int) for p in model.params(0, model.depth) for kind in KINDS
    }
    tp_of = {w: layout.places[w].tp for w in layout.members}
    for w, pieces in held.items():
        for piece in pieces:
            cut = model.param(piece.tensor.partition("/")[2]).split is not None
            counted[piece.tensor][piece.box.slices] += 1 if cut or tp_of[w] == 0 else 0
    for ownership in placed.groups:
        for name in ownership.group.params:
            size = len(ownership.group.members)
            assert all((counted[f"{kind}/{name}"] == min(copies, size)).all() for kind in KINDS)
    assert not reshard({w: slices(model, layout.shard(w)) for w in layout.members}, held, node_of).missing


@settings(max_examples=150)
@given(data=st.data(), model=models(), node_of=nodes(), copies=st.integers(1, 4), bucket=st.integers(1, 40))
def test_tp_ranks_of_a_place_own_the_same_ranges(
    data: st.DataObject, model: ModelShape, node_of: dict[WorkerId, NodeId], copies: int, bucket: int
) -> None:
    """On any nodes. Of what none of them cuts they take over one rank's gradients: sums only where it owns."""
    layout = data.draw(layouts(model.depth))
    placed = place_copies(layout, model, copies, node_of, ALIGNMENT, data.draw(st.sampled_from([None, bucket])))
    held = shards(placed, layout, model, ALIGNMENT)
    for stage in (stage for pipeline in layout.pipelines for stage in pipeline.stages):
        assert len({held[w].owned for w in stage.members}) == 1
        replicated = [
            {piece for piece in slices(model, held[w], ALIGNMENT) if is_replicated(model, piece.tensor)}
            for w in stage.members
        ]
        assert all(pieces == replicated[0] for pieces in replicated)
    owning = [{(p.start, p.stop, *places_of(layout, p.owners)) for p in o.parts} for o in placed.groups]
    for first in range(0, len(owning), layout.tensor):
        assert all(parts == owning[first] for parts in owning[first : first + layout.tensor])


def is_replicated(model: ModelShape, tensor: str) -> bool:
    return model.param(tensor.partition("/")[2]).split is None


def places_of(layout: Layout, owners: Sequence[WorkerId]) -> list[tuple[int, int]]:
    """Their pipelines and stages, in order: who is first owner counts, too."""
    return [(layout.places[w].pipeline, layout.places[w].stage) for w in owners]


def data_parallel(count: int) -> Layout:
    return Layout(tuple(Pipeline((Stage(0, 1, (worker(i),)),), i, i + 1) for i in range(count)))


MODEL = ModelShape((LayerShape("l", (ParamShape("p", (60, ALIGNMENT)),)),))


@given(on=st.lists(st.integers(0, 4), min_size=1, max_size=10), copies=st.integers(1, 10))
def test_owners_are_on_as_many_nodes_as_equal_loads_allow(on: list[int], copies: int) -> None:
    """A node with c members can be among the owners of min(c * r, n) parts, and is."""
    count, r = len(on), min(copies, len(on))
    node_of = {worker(i): NodeId(f"n{node}") for i, node in enumerate(on)}
    (ownership,) = place_copies(data_parallel(count), MODEL, copies, node_of, ALIGNMENT).groups
    assert len(ownership.parts) == count
    assert sorted(part.owners[0] for part in ownership.parts) == [worker(i) for i in range(count)]
    for node in set(on):
        members = {w for w in node_of if node_of[w] == f"n{node}"}
        shares = [len(members.intersection(part.owners)) for part in ownership.parts]
        assert max(shares) - min(shares) <= 1
        assert sum(share > 0 for share in shares) == min(len(members) * r, count)


@pytest.mark.parametrize(
    ("on", "copies", "reason"),
    [
        ("abab", 2, "each slice of optimizer state has at least 2 owners, on different nodes"),
        ("aaab", 2, "each slice of optimizer state has at least 2 owners; 50% of it has its owners on one node"),
        ("ab", 1, "each slice of optimizer state has at least 1 owner; 100% of it has its only owner on one node"),
        (
            "ab",
            3,
            "each slice of optimizer state has at least 2 owners (asked for 3; a group has only 2 members), "
            "on different nodes",
        ),
    ],
)
def test_the_reason_says_what_a_lost_node_costs(on: str, copies: int, reason: str) -> None:
    node_of = {worker(i): NodeId(node) for i, node in enumerate(on)}
    assert place_copies(data_parallel(len(on)), MODEL, copies, node_of, ALIGNMENT).reason == reason


def test_four_members_two_copies() -> None:
    node_of = {worker(i): NodeId(node) for i, node in enumerate("abab")}
    (ownership,) = place_copies(data_parallel(4), MODEL, 2, node_of, ALIGNMENT).groups
    w0, w1, w2, w3 = (worker(i) for i in range(4))
    assert [part.owners for part in ownership.parts] == [(w0, w1), (w1, w0), (w2, w3), (w3, w2)]
    assert [part.start for part in ownership.parts] == [0, 60, 120, 180]
    assert ownership.ranges() == {w0: ((0, 120),), w1: ((0, 120),), w2: ((120, 240),), w3: ((120, 240),)}


def test_units_are_whole_layers_gathered_from_the_last() -> None:
    sizes = [3, 1, 5, 2, 2]
    model = ModelShape(tuple(LayerShape(f"l{i}", (ParamShape(f"p{i}", (4 * n,)),)) for i, n in enumerate(sizes)))
    layout = Layout((Pipeline((Stage(0, 5, (worker(0),)),), 0, 1),))

    def units(bucket: int | None) -> Sequence[int]:
        (ownership,) = place_copies(layout, model, 1, {worker(0): NodeId("n")}, ALIGNMENT, bucket).groups
        return [(stop - start) // 4 for start, stop in ownership.units]

    assert units(None) == [13]
    assert units(16) == [4, 5, 4]
    assert units(1) == sizes


def test_copies_below_one_are_refused() -> None:
    with pytest.raises(ValueError, match=r"redundancy.copies is 0"):
        place_copies(data_parallel(1), MODEL, 0, {worker(0): NodeId("n")}, ALIGNMENT)


def test_large_worlds_are_quick() -> None:
    """2048 pipelines: linear in the number of parts times copies, not in its square."""
    layout = data_parallel(2048)
    node_of = {w: NodeId(f"n{i // 8}") for i, w in enumerate(layout.members)}
    model = ModelShape((LayerShape("l", (ParamShape("p", (2048, 8)),)),))
    (ownership,) = place_copies(layout, model, 2, node_of, ALIGNMENT).groups
    assert all(node_of[a] != node_of[b] for a, b in (part.owners for part in ownership.parts))
    assert all(a.stop == b.start for a, b in pairwise(ownership.parts))
    assert {len(ranges) for ranges in ownership.ranges().values()} == {1}
