"""How an open step is settled, and whose word and whose memory count."""

from evenkeel.control import messages as m
from evenkeel.control.member import Member
from evenkeel.control.settle import decide
from evenkeel.core.ids import INITIAL, NodeId, Version, WorkerId
from evenkeel.core.layout import Layout, Pipeline, Stage, WorkerInfo
from evenkeel.core.model import Shard
from evenkeel.core.vote import SLOTS, Slot, Vote
from evenkeel.core.world import World

A, B = WorkerId("a"), WorkerId("b")
SHARD = Shard(0, 2, 0, 1)
BASE = Version(3, 1)


def vote(step: int, generation: int = 2) -> Vote:
    values = [0.0] * SLOTS
    values[Slot.ONES], values[Slot.STEP] = 2.0, 2.0 * step
    return Vote(generation, step, tuple(values))


def world(base: Version = BASE, generation: int = 2) -> World:
    layout = Layout((Pipeline((Stage(0, 2, (A,)),), 0, 1), Pipeline((Stage(0, 2, (B,)),), 1, 2)))
    members = tuple(WorkerInfo(w, NodeId("n"), 1) for w in (A, B))
    return World(generation, layout, base, members, (), (), 10, "start", "")


def answer(saw: Vote | None = None, *unreported: Vote) -> m.Answer:
    return m.Answer(m.Position(), (), saw, None, tuple(m.Report(v, 0.0) for v in unreported))


def test_without_any_vote_the_base_is_that_of_the_world() -> None:
    decision = decide(world(), {A: answer(), B: answer()}, None)
    assert (decision.base, decision.vote) == (Version(3, 1), None)
    assert decision.reason == "no survivor saw a vote of step 4: it is run again"


def test_one_survivor_that_read_the_vote_is_enough() -> None:
    decision = decide(world(), {A: answer(), B: answer(saw=vote(4))}, None)
    assert (decision.base, decision.vote) == (Version(4, 2), vote(4))
    assert "b read it" in decision.reason


def test_a_report_is_enough_though_no_survivor_read_it() -> None:
    decision = decide(world(), {B: answer()}, witness=vote(5))
    assert (decision.base, decision.vote) == (Version(5, 2), vote(5))


def test_the_newest_vote_decides() -> None:
    decision = decide(world(), {A: answer(vote(5), vote(4), vote(5)), B: answer(vote(6))}, witness=vote(4))
    assert decision.base == Version(6, 2)


def test_votes_of_other_generations_do_not_count() -> None:
    """A member that has not heard of its world yet still remembers what it saw in the one before (rule 7)."""
    old = vote(9, generation=1)
    decision = decide(world(), {A: answer(old, old), B: answer()}, witness=old)
    assert (decision.base, decision.vote) == (Version(3, 1), None)


def test_nobody_answers_for_the_initial_state() -> None:
    assert decide(world(base=INITIAL, generation=1), {}, None).base == INITIAL


def test_the_same_step_of_another_generation_is_not_kept() -> None:
    """Rule 7 in the worker: step 3 of generation 2 is not a copy of step 3 of generation 1."""
    kept = (m.Held(Shard(0, 1, 0, 1), Version(3, 1)),)
    member = Member(A, world=world(), held=m.Held(SHARD, Version(3, 2)), kept=kept)
    member.resharded(Shard(1, 2, 0, 1), Version(3, 1))
    assert member.kept == (m.Held(Shard(0, 1, 0, 1), Version(3, 1)),)
    assert member.held == m.Held(Shard(1, 2, 0, 1), Version(3, 1))


def test_a_prepared_step_of_another_generation_is_not_committed() -> None:
    member = Member(A, floor=3, held=m.Held(SHARD, Version(3, 1)), prepared=Version(4, 1))
    settlement = member.settle(1, m.Decision(2, Version(4, 2), vote(4), ""))
    assert settlement.accepted
    assert settlement.commit is None
    assert member.prepared is None
