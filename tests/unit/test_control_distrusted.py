"""Which checkpoints may hold a wrong copy, by the journal alone."""

from dataclasses import replace

import pytest
from test_control_divergence import differing
from test_control_settle import SHARD, A, world

from evenkeel.control import messages as m
from evenkeel.control.divergence import distrusted, judge
from evenkeel.core.ids import INITIAL, Version
from evenkeel.core.world import Source

FOUR, FIVE_AT_ONCE, FIVE = Version(4, 1), Version(5, 1), Version(5, 2)
TWO_COPIES, THREE_COPIES = {"a": 1, "b": 2}, {"a": 1, "b": 1, "c": 2}


PEERS, STORE, BOTH = "from peers", "from a checkpoint", "from a checkpoint, some keep what they hold"


def opened(generation: int, base: Version, how: str = PEERS) -> m.WorldOpened:
    sources = () if how == STORE else (Source(A, SHARD),)
    return m.WorldOpened(replace(world(base, generation), saved=how != PEERS, sources=sources), ())


def settled(generation: int, base: Version, copies: dict[str, int] | None = None) -> m.StepSettled:
    """Closes that generation at `base`, of which these are the checksums; None: no vote compared them."""
    vote = None if copies is None else differing(copies, step=base.step + 1, generation=generation)
    decision = m.Decision(generation, base, None, "", None if vote is None else judge(vote))
    return m.StepSettled(decision, {}, None, ())


def test_a_journal_without_divergence_distrusts_nothing() -> None:
    assert distrusted([]) == {}
    assert distrusted([m.EpochBegun(1), opened(1, INITIAL), settled(1, FOUR), m.RunEnded("stopped", "asked")]) == {}


@pytest.mark.parametrize("copies", [TWO_COPIES, THREE_COPIES])
def test_the_version_of_which_copies_differ_is_distrusted(copies: dict[str, int]) -> None:
    """Whichever was right, the checkpoint may hold the other."""
    found = distrusted([m.EpochBegun(1), opened(1, INITIAL), settled(1, FOUR, copies)])
    assert found.keys() == {FOUR}
    assert found[FOUR].startswith(f"copies of step 4 differ: part0 on {' '.join(copies)}; ")


@pytest.mark.parametrize(
    ("how", "copies", "versions"),
    [
        (PEERS, TWO_COPIES, {FOUR, FIVE}),
        (PEERS, THREE_COPIES, {FIVE}),  # the majority is right, whatever was before
        (STORE, TWO_COPIES, {FIVE}),  # all have read the one before since
        (STORE, THREE_COPIES, {FIVE}),
        (BOTH, TWO_COPIES, {FOUR, FIVE}),  # of what some have kept nobody has read it
        (BOTH, THREE_COPIES, {FIVE}),
    ],
)
def test_so_is_one_that_was_not_compared_before_its_generation_ended(
    how: str, copies: dict[str, int], versions: set[Version]
) -> None:
    found = distrusted([opened(1, INITIAL), settled(1, FOUR), opened(2, FOUR, how), settled(2, FIVE, copies)])
    assert found.keys() == versions
    assert all(why.startswith("copies of step 5 differ: ") for why in found.values())


@pytest.mark.parametrize("copies", [TWO_COPIES, THREE_COPIES])
@pytest.mark.parametrize(("how", "versions"), [(STORE, set()), (PEERS, {FOUR}), (BOTH, {FOUR})])
def test_what_everybody_has_just_read_is_not_what_differs(
    how: str, versions: set[Version], copies: dict[str, int]
) -> None:
    entries = [opened(1, INITIAL), settled(1, FOUR), opened(2, FOUR, how), settled(2, FOUR, copies)]
    assert distrusted(entries).keys() == versions


@pytest.mark.parametrize("how", [PEERS, STORE, BOTH])
def test_nor_is_what_a_vote_has_compared(how: str) -> None:
    """Whoever held it since, in memory."""
    back = [settled(1, FIVE_AT_ONCE, TWO_COPIES), m.Restored(FOUR, 1, "")]
    found = distrusted([opened(1, INITIAL), *back, opened(2, FOUR, how), settled(2, FOUR, TWO_COPIES)])
    assert found.keys() == {FIVE_AT_ONCE}


def test_it_lasts_through_ends_and_restores_and_the_first_reason_is_kept() -> None:
    entries = [opened(1, INITIAL), settled(1, FOUR, TWO_COPIES), m.Restored(INITIAL, 1, ""), m.RunEnded("failed", "")]
    again = [m.EpochBegun(2), opened(2, INITIAL), settled(2, FIVE, TWO_COPIES)]
    found = distrusted([*entries, *again])
    assert [(version, why[:16]) for version, why in sorted(found.items())] == [
        (FOUR, "copies of step 4"),
        (FIVE, "copies of step 5"),
    ]
