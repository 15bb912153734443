"""Which copies a vote compares, and what it says of them: against counting every element."""

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from random_layouts import layouts, models, nodes

from evenkeel.core.ids import NodeId, Version, WorkerId
from evenkeel.core.layout import Layout, WorkerInfo
from evenkeel.core.model import ModelShape
from evenkeel.core.vote import SLOTS, Flags, Slot, Vote
from evenkeel.core.world import World
from evenkeel.plan.comparison import Compared, checksums, compared, due, read_vote
from evenkeel.plan.copies import copies_of


def world_of(layout: Layout, node_of: Mapping[WorkerId, NodeId], copies: int | None) -> World:
    members = tuple(WorkerInfo(w, node_of[w], 1) for w in layout.members)
    return World(2, layout, Version(20, 1), members, (), tuple(node_of.items()), 47, "start", "", copies=copies)


@settings(max_examples=100)
@given(data=st.data(), model=models(), node_of=nodes(), copies=st.sampled_from([None, 1, 2, 3, 9]))
def test_every_element_is_compared_with_all_its_copies(
    data: st.DataObject, model: ModelShape, node_of: dict[WorkerId, NodeId], copies: int | None
) -> None:
    world = world_of(data.draw(layouts(model.depth)), node_of, copies)
    placed = copies_of(world, model)
    parts = compared(world, placed)
    assert len({part.name for part in parts}) == len(parts)
    for ownership in placed.groups:
        members = ownership.group.members
        owned = np.zeros((len(members), ownership.size), bool)
        if copies is None:
            owned[:] = True
        for part in ownership.parts if copies is not None else ():
            for owner in part.owners:
                owned[members.index(owner), part.start : part.stop] = True
        found = np.zeros_like(owned)
        for compared_part in (p for p in parts if p.group == ownership.group):
            assert len(compared_part.owners) > 1
            for start, stop in compared_part.ranges:
                assert not found[:, start:stop].any()
                for owner in compared_part.owners:
                    found[members.index(owner), start:stop] = True
        np.testing.assert_array_equal(found, owned & (owned.sum(0) > 1))


@settings(max_examples=100)
@given(data=st.data(), model=models(), node_of=nodes(), copies=st.sampled_from([None, 2, 3]))
def test_a_vote_tells_the_differences_and_nothing_else(
    data: st.DataObject, model: ModelShape, node_of: dict[WorkerId, NodeId], copies: int | None
) -> None:
    world = world_of(data.draw(layouts(model.depth)), node_of, copies)
    parts = compared(world, copies_of(world, model))
    owned = [(part, owner) for part in parts for owner in part.owners]
    held = {copy: data.draw(st.sampled_from([1, 1, 1, 7, 2**53 - 1])) for copy in owned}
    summed = np.zeros(SLOTS + sum(len(part.owners) for part in parts))
    for me in world.layout.members:
        mine = list(checksums(parts, me, lambda part, me=me: held[part, me]))  # type: ignore[misc]
        summed += [1.0, 21.0, *[0.0] * (SLOTS - 2), *mine]
    vote = read_vote(2, 21, summed.tolist(), parts)
    assert vote.complete(world.size)
    expected = {p.name: {o: held[p, o] for o in p.owners} for p in parts if len({held[p, o] for o in p.owners}) > 1}
    assert {d.part: dict(d.sums) for d in vote.differences} == expected


def two() -> tuple[World, tuple[Compared, ...]]:
    world = world_of(Layout(()), {}, None)
    return world, (Compared("a", None, ((0, 64),), (WorkerId("x"), WorkerId("y"))),)  # type: ignore[arg-type]


@pytest.mark.parametrize("sums", [[], [5.0], [5.0, 0.0], [5.0, 5.0, 5.0]])
def test_with_a_checksum_missing_a_vote_is_not_complete(sums: list[float]) -> None:
    """As with its other guards: an aborted all-reduce may claim success with a partial sum (rule 2)."""
    _, parts = two()
    values = [2.0, 42.0, *[0.0] * (SLOTS - 2)]
    assert read_vote(2, 21, [*values, 5.0, 5.0], parts).complete(2)
    assert not read_vote(2, 21, [*values, *sums], parts).complete(2)


def vote_with(flags: Flags, busy: float = 0.0) -> Vote:
    values = [0.0] * SLOTS
    values[Slot.CHECKPOINT], values[Slot.BUSY] = float(Flags.CHECKPOINT in flags), busy
    return Vote(2, 1, tuple(values))


def test_when_copies_are_compared() -> None:
    world = replace(two()[0], compare_every=10)
    before = vote_with(Flags.NONE)
    steps = [step for step in range(21, 48) if due(world, step, None if step == 21 else before)]
    assert steps == [21, 30, 40, 47]
    assert due(world, 33, vote_with(Flags.CHECKPOINT))
    assert not due(world, 33, vote_with(Flags.CHECKPOINT, busy=1.0))
