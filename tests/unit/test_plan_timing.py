"""What was measured rides on a vote: what goes in comes out, and nothing that is half there counts."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from random_layouts import layouts

from evenkeel.control.member import Member
from evenkeel.core.ids import NodeId, Version, WorkerId
from evenkeel.core.layout import Layout, Pipeline, Stage, WorkerInfo
from evenkeel.core.vote import SLOTS, Timing, Vote
from evenkeel.core.world import World
from evenkeel.plan.timing import due, read, slots, split


def world_of(layout: Layout, every: int | None = 4) -> World:
    members = tuple(WorkerInfo(w, NodeId("a"), 1) for w in layout.members)
    return World(2, layout, Version(20, 1), members, (), (), 47, "start", "", measure_every=every)


seconds = st.floats(1e-9, 1e3)


@settings(max_examples=100)
@given(data=st.data())
def test_everybody_reads_everybody(data: st.DataObject) -> None:
    world = world_of(data.draw(layouts(5)))
    timings: list[Timing] = []
    for worker in world.layout.members:
        shard, place = world.layout.shard(worker), world.layout.places[worker]
        depth = 0 if place.tp else shard.stop - shard.start
        layers = data.draw(st.one_of(st.just(()), st.tuples(*[seconds] * depth)))
        pass_s = data.draw(st.one_of(st.just(0.0), seconds)) if not layers else data.draw(seconds)
        source = data.draw(st.one_of(st.none(), st.sampled_from(world.layout.members)))
        rate = data.draw(seconds) if source is not None else 0.0
        timings.append(Timing(worker, pass_s, data.draw(st.one_of(st.just(0.0), seconds)), layers, source, rate))
    ballots = [[1.0] * SLOTS + list(slots(world, timing)) for timing in timings]
    summed = [sum(column) for column in zip(*ballots, strict=True)]
    rest, told = split(world, 24, summed)
    assert list(rest) == [float(world.size)] * SLOTS
    assert list(read(world, told)) == timings


def test_only_the_leader_works_out_what_everybody_has_measured() -> None:
    """It alone tells the controller; for the others, thousands of them, it would be time that each step pays for."""
    members = [WorkerId("a"), WorkerId("b")]
    layout = Layout(tuple(Pipeline((Stage(0, 1, (worker,)),), i, i + 1) for i, worker in enumerate(members)))
    world = world_of(layout)
    timings = tuple(Timing(worker, 1.0 + i, layers=(1.0 + i,)) for i, worker in enumerate(members))
    told = [sum(column) for column in zip(*(slots(world, timing) for timing in timings), strict=True)]
    vote = Vote(2, 24, (2.0, 48.0, 1.0, 1.0, 1.0, *[0.0] * (SLOTS - 5)))
    heard = []
    for worker in members:
        member = Member(worker)
        member.world, member.floor = world, 1
        assert member.see(vote, told)
        heard.append(member.timings)
    assert heard == [timings, ()]


def two() -> World:
    return world_of(Layout(()), 4)


@pytest.mark.parametrize("missing", range(5))
def test_with_somebodys_part_missing_there_is_no_vote(missing: int) -> None:
    """As with its other guards: an aborted all-reduce may claim success with a partial sum (rule 2)."""
    worker = WorkerId("x")
    world = world_of(Layout((Pipeline((Stage(0, 1, (worker,)),), 0, 1),)))
    summed = [1.0] * SLOTS + list(slots(world, Timing(worker, 2.0, layers=(2.0,))))
    assert read(world, split(world, 24, summed)[1]) == (Timing(worker, 2.0, layers=(2.0,)),)
    summed[SLOTS + missing] = 0.0
    assert split(world, 24, summed) == ((), ())


def test_which_votes_tell() -> None:
    world = two()
    assert [step for step in range(21, 34) if due(world, step)] == [24, 28, 32]
    assert not due(replace(world, base=Version(23, 1)), 24)
    assert not due(replace(world, measure_every=None), 24)
    assert split(world, 25, [1.0, 2.0]) == ([1.0, 2.0], ())
