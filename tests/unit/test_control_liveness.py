"""When silence is too long, who is to blame, and how often a start is tried: bookkeeping of times that are given."""

from evenkeel.control import liveness as lv
from evenkeel.control.liveness import Liveness, blame
from evenkeel.control.messages import Position
from evenkeel.control.roster import MAX_START_FAILURES, RETRY_MAX_S, RETRY_S, Roster
from evenkeel.control.trouble import MAX_ATTEMPTS, MAX_CRASHES, Trouble
from evenkeel.core.ids import NodeId, WorkerId
from evenkeel.core.layout import WorkerInfo
from evenkeel.core.vote import SLOTS, Slot, Vote

A, B, C = WorkerId("a"), WorkerId("b"), WorkerId("c")


def at(step: int, phase: int = 3, waiting: bool = False) -> Position:
    return Position(1, step, phase, waiting=waiting)


def running(step_s: float = 1.0, steps: int = 5) -> Liveness:
    """Some steps into a world."""
    liveness = Liveness()
    liveness.begin(0.0)
    for i in range(steps):
        liveness.committed(step_s * (i + 1))
    return liveness


def test_limits_follow_from_the_time_of_a_step() -> None:
    quick, slow = running(0.1), running(20.0)
    assert quick.silence_s < slow.silence_s == lv.SILENCE_S + 2 * slow.step_s
    assert quick.stuck_s == lv.STUCK_S
    assert slow.stuck_s == lv.STUCK_STEPS * slow.step_s


def test_a_silent_worker_is_asked_twice_before_it_counts() -> None:
    liveness = running()
    now = liveness.next_check()
    assert liveness.due(now)
    probe = liveness.ask(now, (A, B))
    liveness.located(now, A, probe, at(6))
    now += liveness.probe_s
    assert liveness.unanswered(now) == ()
    assert liveness.ask_again(now) == (B,)
    assert liveness.ask_again(now) == ()
    now += liveness.probe_s
    assert liveness.unanswered(now) == (B,)


def test_answers_to_an_earlier_probe_are_ignored() -> None:
    liveness = running()
    probe = liveness.ask(10.0, (A,))
    liveness.located(10.0, A, probe - 1, at(6))
    liveness.located(10.0, C, probe, at(6))
    assert liveness.found == {}


def test_who_moves_is_not_stuck() -> None:
    liveness = running()
    now = 10.0
    for step in range(20):
        now = max(now, liveness.next_check())
        liveness.located(now, A, liveness.ask(now, (A,)), at(6, step))
        assert not liveness.stuck(now)
    moved_at = now
    while not liveness.stuck(now):
        now = liveness.next_check()
        liveness.located(now, A, liveness.ask(now, (A,)), at(6, 19))
    assert now >= moved_at + liveness.stuck_s


def test_a_limit_doubles_with_each_kill_without_progress_but_not_for_ever() -> None:
    liveness = running()
    before, longest = liveness.silence_s, liveness.patience_s
    for _ in range(50):
        liveness.strike()
    assert liveness.silence_s == before * 2**lv.MAX_STRIKES
    assert liveness.stuck_s <= liveness.patience_s == longest
    liveness.committed(7.0)
    assert liveness.silence_s <= before * 2


def test_the_one_that_others_wait_for_is_to_blame() -> None:
    assert blame({A: at(3, waiting=True), B: at(3), C: at(3, waiting=True)}) == B
    assert blame({A: at(4, waiting=True), B: at(3), C: at(4)}) == B
    assert blame({A: at(3, waiting=True), B: at(3, waiting=True)}) is None
    assert blame({A: at(3), B: at(3)}) is None
    assert blame({A: at(3, waiting=True), B: at(3), C: at(3)}) is None
    assert blame({A: at(3)}) is None


def test_who_is_not_waited_for_any_more_needs_not_answer() -> None:
    liveness = running()
    now = liveness.next_check()
    probe = liveness.ask(now, (A, B))
    liveness.located(now, A, probe, at(6))
    liveness.expect(now + 0.1, (A,))
    assert liveness.unanswered(now + 100) == ()
    assert liveness.due(liveness.next_check())


def test_limits_are_long_for_what_answers_and_finite_for_all() -> None:
    for liveness in (Liveness(), running(0.1), running(60.0)):
        for _ in range(50):
            assert liveness.stuck_s <= liveness.patience_s < float("inf")
            liveness.strike()
    assert Liveness().stuck_s == lv.FIRST_STEP_S
    assert running(60.0).patience_s == lv.PATIENCE_STEPS * 60.0


def test_failed_starts_are_tried_again_later_and_later() -> None:
    roster = Roster(wanted=2)
    assert roster.to_start(0.0) == 2
    assert roster.to_start(0.0) == 0
    now, waits = 0.0, []
    for _ in range(MAX_START_FAILURES):
        assert not roster.hopeless
        roster.start_failed(now, 2)
        assert roster.to_start(now) == 0
        assert roster.retry_at is not None
        waits.append(roster.retry_at - now)
        now = roster.retry_at
        assert roster.to_start(now) == 2
    assert waits[:3] == [RETRY_S, 2 * RETRY_S, 4 * RETRY_S]
    assert max(waits) <= RETRY_MAX_S
    assert roster.hopeless


def test_a_worker_that_came_makes_starts_hopeful_again_and_the_lost_stay_lost() -> None:
    roster = Roster(wanted=1)
    roster.to_start(0.0)
    roster.start_failed(0.0, 1)
    info = WorkerInfo(A, NodeId("n"), 1)
    assert roster.add(info)
    assert roster.failures == 0
    roster.remove(A)
    assert not roster.add(info)


def test_no_start_while_a_killed_worker_still_has_its_device() -> None:
    roster = Roster(wanted=1, dying={A})
    assert roster.to_start(0.0) == 0
    roster.dying.discard(A)
    assert roster.to_start(0.0) == 1


def a_vote(step: int, nonfinite: float = 0.0) -> Vote:
    values = [0.0] * SLOTS
    values[Slot.ONES], values[Slot.TOKENS], values[Slot.NONFINITE] = 1.0, 8.0, nonfinite
    return Vote(1, step, tuple(values))


def test_an_exception_is_retried_once_in_a_new_generation() -> None:
    trouble = Trouble(max_bad_steps=10)
    trouble.exception(5, 1, "w1: bad")
    trouble.exception(5, 1, "w2: bad")
    assert trouble.verdict(5) is None
    trouble.exception(5, 2, "w1: bad")
    assert trouble.verdict(5) == "failed again after a retry: w1: bad"
    trouble.committed(a_vote(5))
    assert trouble.verdict(6) is None


def test_a_step_that_kills_three_times_and_worlds_that_never_commit_end_the_run() -> None:
    trouble = Trouble(max_bad_steps=10)
    for _ in range(MAX_CRASHES):
        assert trouble.verdict(5) is None
        trouble.broken(5, "last: worker lost (w1)", ["w1 (killed by SIGKILL)"])
    assert "took workers down 3 times: w1 (killed by SIGKILL), w1" in (trouble.verdict(5) or "")
    trouble.committed(a_vote(5))
    for _ in range(MAX_ATTEMPTS):
        assert trouble.verdict(6) is None
        trouble.broken(6, "last: broken collective")
    assert "broke before a commit" in (trouble.verdict(6) or "")


def test_only_steps_in_a_row_that_are_not_finite_end_the_run() -> None:
    trouble = Trouble(max_bad_steps=2)
    for step, nonfinite in ((1, 1.0), (2, 0.0), (3, 1.0)):
        trouble.committed(a_vote(step, nonfinite))
        assert trouble.verdict(step + 1) is None
    trouble.committed(a_vote(4, 1.0))
    assert trouble.verdict(5) == "step 4: loss or gradient not finite in 2 steps in a row"
