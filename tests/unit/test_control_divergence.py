"""Copies that differ: who is named, and that a step that everybody refused is committed by nobody."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_control_settle import BASE, SHARD, A, B, answer, vote, world

from evenkeel.control import messages as m
from evenkeel.control.divergence import describe, judge
from evenkeel.control.member import Member
from evenkeel.control.settle import decide
from evenkeel.control.trouble import Trouble
from evenkeel.core.ids import Version, WorkerId
from evenkeel.core.vote import Difference, Vote


def differing(*parts: dict[str, int], step: int = 4, generation: int = 2) -> Vote:
    found = tuple(
        Difference(f"part{i}", tuple((WorkerId(owner), checksum) for owner, checksum in part.items()))
        for i, part in enumerate(parts)
    )
    values = vote(step, generation).values
    return Vote(generation, step, values, found)


@pytest.mark.parametrize(
    ("parts", "odd", "doubtful"),
    [
        ([{"a": 1, "b": 2}], [], ["a", "b"]),
        ([{"a": 1, "b": 1, "c": 2}], ["c"], []),
        ([{"a": 1, "b": 2, "c": 3}], [], ["a", "b", "c"]),
        ([{"a": 1, "b": 1, "c": 2, "d": 2}], [], ["a", "b", "c", "d"]),
        ([{"a": 1, "b": 1, "c": 1, "d": 2, "e": 3}], ["d", "e"], []),
        ([{"a": 1, "b": 1, "c": 2}, {"c": 1, "d": 2}], ["c"], ["c", "d"]),
        ([{"a": 1, "b": 1, "c": 2}, {"a": 3, "b": 1, "c": 1}], ["a", "c"], []),
    ],
)
def test_the_majority_is_right(parts: list[dict[str, int]], odd: list[str], doubtful: list[str]) -> None:
    divergence = judge(differing(*parts))
    assert (list(divergence.odd), list(divergence.doubtful)) == (odd, doubtful)
    assert "copies of step 3 differ: part0 on a b" in describe(divergence)


@given(st.lists(st.integers(1, 3), min_size=2, max_size=7).filter(lambda sums: len(set(sums)) > 1))
def test_nobody_of_a_majority_is_named(sums: list[int]) -> None:
    divergence = judge(differing({f"w{i}": checksum for i, checksum in enumerate(sums)}))
    most = [value for value in set(sums) if sums.count(value) > len(sums) / 2]
    assert bool(most) == bool(divergence.odd) != bool(divergence.doubtful)
    named = {*divergence.odd, *divergence.doubtful}
    assert named == {f"w{i}" for i, checksum in enumerate(sums) if [checksum] != most}


def test_a_vote_that_was_refused_is_never_rolled_forward() -> None:
    """Nor if it should come with a report or as a vote that was seen; but what it says of the copies counts."""
    refused = differing({"a": 1, "b": 2})
    answers = {A: answer(refused, refused), B: m.Answer(m.Position(), diverged=refused)}
    decision = decide(world(), answers, witness=refused)
    assert (decision.base, decision.vote) == (BASE, None)
    assert decision.void
    assert decision.reason == "copies of step 3 differ: part0 on a b; nobody knows which of a, b is right"


def test_a_decision_that_commits_the_step_before_tells_of_both() -> None:
    refused = differing({"a": 1, "b": 1, "c": 2}, step=5)
    decision = decide(world(), {A: m.Answer(m.Position(), saw=vote(4), diverged=refused)}, None)
    assert (decision.base, decision.vote) == (Version(4, 2), vote(4))
    assert decision.divergence == judge(refused)
    assert decision.reason.startswith("the vote of step 4 is complete: a read it; copies of step 4 differ: ")


def test_a_refused_vote_of_another_generation_says_nothing() -> None:
    old = m.Answer(m.Position(), diverged=differing({"a": 1, "b": 2}, generation=1))
    assert decide(world(), {A: old}, None).divergence is None


def seated() -> Member:
    member = Member(A, epoch=1)
    assert member.form(1, world())
    member.resharded(SHARD, BASE)
    member.prepare(2, 4)
    return member


def test_a_member_refuses_and_says_so_in_its_answer() -> None:
    member, refused = seated(), differing({"a": 1, "b": 2})
    assert not member.see(refused)
    assert member.held == m.Held(SHARD, BASE)
    member.park()
    assert member.abort(1, 2, 3)
    given_answer = member.answer(2, m.Position())
    assert given_answer is not None
    assert (given_answer.saw, given_answer.diverged) == (None, refused)


def test_an_aborted_vote_says_nothing_of_the_copies() -> None:
    """Its sums may be partial (rule 2), so what seems to differ may be what is missing."""
    member = seated()
    assert member.abort(1, 2, 3)
    assert not member.see(differing({"a": 1, "b": 2}))
    assert member.diverged is None


@pytest.mark.parametrize("owners", [{"a": 1, "b": 2}, {"a": 1, "b": 1, "c": 2}])
def test_where_no_copy_counts_everybody_drops_what_it_holds(owners: dict[str, int]) -> None:
    member, refused = seated(), differing(owners)
    member.see(refused)
    member.park()
    member.abort(1, 2, 3)
    decision = decide(world(), {A: m.Answer(m.Position(), diverged=refused)}, None)
    assert member.settle(1, decision) == member.settle(1, decision)
    assert member.holdings == (() if len(owners) == 2 else (m.Held(SHARD, BASE),))


def test_a_repeat_before_the_step_is_committed_ends_the_run() -> None:
    trouble = Trouble(10)
    trouble.doubtful(7, "copies of step 6 differ")
    assert trouble.verdict(4) is None
    trouble.committed(vote(6))
    trouble.doubtful(7, "copies of step 6 differ")
    assert trouble.verdict(4) == "again after the run went back, copies of step 6 differ"
    trouble.forgive()
    trouble.doubtful(7, "copies of step 6 differ")
    trouble.committed(vote(7))
    trouble.doubtful(9, "copies of step 8 differ")
    assert trouble.verdict(4) is None
