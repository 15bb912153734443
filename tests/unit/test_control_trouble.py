"""What is forgiven, and what ends a run."""

from evenkeel.control.trouble import Trouble
from evenkeel.core.vote import SLOTS, Slot, Vote


def vote(step: int) -> Vote:
    values = [0.0] * SLOTS
    values[Slot.TOKENS] = 1.0
    return Vote(1, step, tuple(values))


def test_a_step_that_raises_twice_ends_the_run() -> None:
    trouble = Trouble(max_bad_steps=3)
    trouble.exception(3, 1, "first")
    assert trouble.verdict(3) is None
    trouble.exception(3, 2, "second")
    assert trouble.verdict(3) == "failed again after a retry: second"


def test_a_commit_forgives_only_what_went_before_it() -> None:
    """The report of step 2 may be heard after the error of step 3."""
    trouble = Trouble(max_bad_steps=3)
    trouble.exception(3, 1, "first")
    trouble.committed(vote(2))
    trouble.exception(3, 2, "second")
    assert trouble.verdict(3) is not None
    trouble.committed(vote(3))
    assert trouble.verdict(3) is None
