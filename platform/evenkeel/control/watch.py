"""What happens when nothing happens: silence, hangs, and workers that others wait for (design, section 5)."""

from collections.abc import Iterator, Sequence
from typing import assert_never

from evenkeel.control import forming, saving
from evenkeel.control import messages as m
from evenkeel.control.holders import is_last_holder
from evenkeel.control.liveness import blame
from evenkeel.control.modes import Aborting, Ended, Forming, Gathering, Running, Settling
from evenkeel.control.repair import break_world, kill
from evenkeel.control.state import State
from evenkeel.core.ids import WorkerId

PARKED = m.PHASES.index("parked")
WRITING = (m.PHASES.index("commit"), m.PHASES.index("finish"))
"""Phases in which what takes long is memory, or the store."""
_WITH_MEMBERS = (Forming, Running)


def tick(s: State, now: float) -> None:
    """A limit may have passed."""
    saving.tick(s, now)
    if s.over:
        return
    awaited = _awaited(s)
    if awaited:
        _watch(s, now, awaited)


def next_tick(s: State, now: float) -> float | None:
    """When `tick`, or another try to start workers, may have something to do."""
    saved_at = saving.next_tick(s)
    if s.over:
        return now if saved_at is None else saved_at
    times = [at for at in (s.roster.retry_at, saved_at) if at is not None]
    match s.mode:
        case Forming() | Running() | Aborting() | Settling():
            times.append(s.liveness.next_check())
        case Gathering(places_until=places):
            times += [at for at in (forming.gathers_until(s), places) if at is not None and now < at]
        case Ended():
            pass
        case _:
            assert_never(s.mode)
    return min(times, default=None)


def probe(s: State, now: float) -> None:
    """Asks everybody who is waited for where it is."""
    awaited = _awaited(s)
    number = s.liveness.ask(now, awaited)
    s.say(*(m.Probe(w, s.epoch, number) for w in awaited))


def located(s: State, now: float, event: m.Located) -> None:
    s.liveness.located(now, event.worker_id, event.probe, event.position)
    if not _is_awaited(s, event.worker_id):
        return
    match s.mode:
        case Aborting(world, ask):
            # It lives, but has not answered: the command or its answer may have been lost.
            s.say(m.Abort(event.worker_id, s.epoch, world.generation, ask, s.visible))
        case Settling(_, ask, decision=decision):
            s.say(m.Settle(event.worker_id, s.epoch, ask, decision))
        case Forming() | Running():
            _located_member(s, now, event)
        case Gathering() | Ended():
            pass
        case _:
            assert_never(s.mode)


def many_located(s: State, now: float, events: Iterator[m.Located]) -> int:
    """Takes down the first of these from which nothing follows: who says it is in the present world, and at work.
    Returns how many those are."""
    count = 0
    while isinstance(s.mode, _WITH_MEMBERS) and (event := next(events, None)) is not None:
        at = event.position
        if at.generation != s.mode.world.generation or at.phase == PARKED:
            break
        s.liveness.located(now, event.worker_id, event.probe, at)
        count += 1
    return count


def _located_member(s: State, now: float, event: m.Located) -> None:
    assert isinstance(s.mode, Forming | Running)
    world = s.mode.world
    if isinstance(s.mode, Forming) and event.position.generation < world.generation:
        # It answers, but has not heard of the world: the command was lost on the way.
        s.say(m.Form(event.worker_id, s.epoch, world))
        return
    parked = (event.position.generation, event.position.phase) == (world.generation, PARKED)
    if parked and (s.committed.step < s.policy.last_step or event.worker_id == world.leader):
        # It has left this world for good: at an abort or a pause of the controller's life before, for a fault that
        # was not heard of, or after the end, whose word was lost. Waiting for it would end in a kill.
        break_world(s, now, "a member has left")


def _awaited(s: State) -> tuple[WorkerId, ...]:
    """Whom the present mode waits for."""
    match s.mode:
        case Forming(world) | Running(world):
            return s.survivors(world)
        case Aborting(world, awaited=awaited) | Settling(world, awaited=awaited):
            return tuple(w for w in s.survivors(world) if w in awaited)
        case Gathering() | Ended():
            return ()
        case _:
            assert_never(s.mode)


def _is_awaited(s: State, worker: WorkerId) -> bool:
    """Whether it is one of _awaited."""
    match s.mode:
        case Forming(world) | Running(world):
            return worker in world.layout.places and worker in s.roster.alive
        case Aborting(awaited=awaited) | Settling(awaited=awaited):
            return worker in awaited
        case Gathering() | Ended():
            return False
        case _:
            assert_never(s.mode)


def _watch(s: State, now: float, awaited: Sequence[WorkerId]) -> None:
    """Silence: ask everybody, kill who does not answer, and who stays where it is for too long."""
    s.liveness.expect(now, awaited)
    quiet_s = now - s.liveness.quiet_since
    again = s.liveness.ask_again(now)
    silent = s.liveness.unanswered(now)
    if again:
        s.say(*(m.Probe(w, s.epoch, s.liveness.probe) for w in again))
    elif silent:
        s.liveness.strike()
        for worker in silent:
            kill(s, now, worker, "no answer to a probe", quiet_s, blameless=True)
    elif not _unstick(s, now, awaited) and s.liveness.due(now):
        probe(s, now)


def _unstick(s: State, now: float, awaited: Sequence[WorkerId]) -> bool:
    """Whether something was done about members that answer, but keep the others waiting for too long."""
    match s.mode:
        case Aborting(since=since):
            return _kill_overdue(s, now, since, awaited, "park")
        case Settling(since=since):
            return _kill_overdue(s, now, since, awaited, "settle")
        case _:
            return s.liveness.stuck(now) and _evict_or_rebuild(s, now)


def _kill_overdue(s: State, now: float, since: float, awaited: Sequence[WorkerId], what: str) -> bool:
    limit, longest = s.liveness.stuck_s, s.liveness.patience_s
    if now < since + limit:
        return False
    overdue = [w for w in awaited if now >= since + longest or not _is_spared(s, w)]
    if overdue:
        s.liveness.strike()
    for worker in overdue:
        kill(s, now, worker, f"did not {what} within {limit if now < since + longest else longest:.0f} s", now - since)
    return bool(overdue)


def _evict_or_rebuild(s: State, now: float) -> bool:
    positions, overdue = s.liveness.before, s.liveness.overdue(now)
    culprit = blame(positions)
    if culprit is None and not overdue and not all(p.waiting for p in positions.values()):
        return False  # they are busy, and nobody waits for one alone
    if culprit is None:
        least = min(sorted(positions), key=lambda w: positions[w])
        if least in s.blamed and (overdue or not _is_spared(s, least)):
            culprit = least
        s.blamed.add(least)
    elif not overdue and _is_spared(s, culprit):
        return False
    s.liveness.strike()
    quiet_s = now - s.liveness.quiet_since
    if culprit is None:
        break_world(s, now, "no progress, nobody behind the others", quiet_s)
    else:
        kill(s, now, culprit, "no progress, others wait for it", quiet_s)
    return True


def _is_spared(s: State, worker: WorkerId) -> bool:
    """Whether to kill this worker, which answers, may cost more than to wait for it."""
    position = s.liveness.before.get(worker)
    return (position is not None and position.phase in WRITING) or is_last_holder(s, worker)
