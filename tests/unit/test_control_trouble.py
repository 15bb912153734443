"""What is forgiven, and what ends a run."""

from evenkeel.control.incident import Incident
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


def test_crashes_of_a_step_survive_going_back_until_it_is_committed() -> None:
    trouble = Trouble(max_bad_steps=3)
    for worker in ("a", "b", "c"):
        assert trouble.verdict(5) is None
        trouble.broken(5, "worker lost", [f"{worker} (killed)"])
        for step in (3, 4):
            trouble.committed(vote(step))
    assert (trouble.verdict(5) or "").startswith("step 5 took workers down 3 times: a (killed), b (killed), c (killed)")
    assert trouble.verdict(4) is None
    trouble.committed(vote(5))
    assert trouble.verdict(5) is trouble.verdict(6) is None
    assert trouble.deaths(5) == ""


def test_if_nobody_is_left_the_step_may_be_the_one_after() -> None:
    """The report of step 4 was lost twice, with everybody who could have said that it was committed."""
    trouble = Trouble(max_bad_steps=3)
    trouble.broken(4, "worker lost", ["a (killed)"], sure=False)
    trouble.committed(vote(4))
    trouble.broken(5, "worker lost", ["b (killed)"], sure=True)
    assert trouble.verdict(5) is None
    trouble.broken(4, "worker lost", ["c (killed)"], sure=False)
    assert (trouble.verdict(4) or "").startswith("step 5 took workers down 3 times")


def test_deaths_in_other_steps_do_not_add_up() -> None:
    trouble = Trouble(max_bad_steps=3)
    for step in (9, 7, 5):
        trouble.broken(step, "worker lost", ["a (killed)"])
    assert trouble.verdict(5) is None
    assert trouble.deaths(5) == "workers died in step 5: a (killed)"
    assert trouble.deaths(6) == ""


def test_the_phases_of_an_incident_are_of_its_last_attempt() -> None:
    incident = Incident("worker lost", 10.0, detect_s=0.5)
    incident.abort(10.0)
    incident.answered_at, incident.settled_at = 11.0, 12.0
    incident.formed(13.0)
    incident.regroup_s = 5.0
    incident.abort(20.0)
    incident.answered_at, incident.settled_at = 20.25, 20.5
    incident.formed(28.5)
    incident.regroup_s, incident.reshard_s, incident.joined_at = 1.0, 2.0, 32.5
    fields = incident.fields(33.5)
    assert fields["phases"] == {
        "detect": 0.5, "abort": 0.25, "settle": 0.25, "plan": 1.0, "regroup": 1.0, "reshard": 2.0, "first_step": 1.0,
    }  # fmt: skip
    assert (fields["waited"], fields["earlier"], fields["attempts"]) == (8.0, 10.0, 2)
    assert sum(fields["phases"].values()) + fields["waited"] + fields["earlier"] == fields["total"] == 24.0
