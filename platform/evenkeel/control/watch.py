"""What happens when nothing happens: silence, hangs, and workers that others wait for (design, section 5)."""

from typing import assert_never

from evenkeel.control import forming, saving
from evenkeel.control import messages as m
from evenkeel.control.liveness import blame
from evenkeel.control.modes import Aborting, Ended, Forming, Gathering, Running, Settling, members_of
from evenkeel.control.repair import break_world, kill
from evenkeel.control.state import State
from evenkeel.core.ids import WorkerId

PARKED = m.PHASES.index("parked")


def tick(s: State, now: float) -> None:
    """A limit may have passed."""
    saving.tick(s, now)
    if s.over:
        return
    match s.mode:
        case Forming() | Running():
            _watch(s, now)
        case Aborting(world, since=since, answers=answers):
            _kill_silent(s, now, since, set(s.survivors(world)) - answers.keys(), "did not park")
        case Settling(world, since=since, done=done):
            _kill_silent(s, now, since, set(s.survivors(world)) - done.keys(), "did not settle")
        case Gathering() | Ended():
            pass
        case _:
            assert_never(s.mode)


def next_tick(s: State, now: float) -> float | None:
    """When `tick`, or another try to start workers, may have something to do."""
    saved_at = saving.next_tick(s)
    if s.over:
        return now if saved_at is None else saved_at
    times = [at for at in (s.roster.retry_at, saved_at) if at is not None]
    match s.mode:
        case Forming() | Running():
            times.append(s.liveness.next_check())
        case Aborting(since=since) | Settling(since=since):
            times.append(since + s.liveness.park_s)
        case Gathering():
            until = forming.gathers_until(s)
            if until is not None and now < until:
                times.append(until)
        case Ended():
            pass
        case _:
            assert_never(s.mode)
    return min(times, default=None)


def probe(s: State, now: float) -> None:
    """Asks every member where it is."""
    members = sorted(members_of(s.mode) & s.roster.alive.keys())
    number = s.liveness.ask(now, members)
    s.say(*(m.Probe(w, s.epoch, number) for w in members))


def located(s: State, now: float, event: m.Located) -> None:
    s.liveness.located(now, event.worker_id, event.probe, event.position)
    if not isinstance(s.mode, Forming | Running) or event.worker_id not in members_of(s.mode) & s.roster.alive.keys():
        return
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


def _kill_silent(s: State, now: float, since: float, silent: set[WorkerId], what: str) -> None:
    limit = s.liveness.park_s
    if not silent or now < since + limit:
        return
    s.liveness.strike()
    for worker in sorted(silent):
        kill(s, now, worker, f"{what} within {limit:.1f} s", limit)
        if s.incident is not None:
            s.incident.unparked.add(worker)


def _watch(s: State, now: float) -> None:
    """Missing progress: ask everybody, kill who does not answer, then who others wait for."""
    quiet_s = now - s.liveness.progress_at
    again = s.liveness.ask_again(now)
    silent = s.liveness.unanswered(now)
    if again:
        s.say(*(m.Probe(w, s.epoch, s.liveness.probe) for w in again))
    elif silent:
        s.liveness.strike()
        for worker in silent:
            kill(s, now, worker, "no answer to a probe", quiet_s)
    elif s.liveness.stuck(now):
        s.liveness.strike()
        _evict_or_rebuild(s, now, quiet_s)
    elif s.liveness.due(now):
        probe(s, now)


def _evict_or_rebuild(s: State, now: float, quiet_s: float) -> None:
    positions = s.liveness.before
    culprit = blame(positions)
    if culprit is None:
        least = min(sorted(positions), key=lambda w: positions[w])
        if least in s.blamed:
            culprit = least
        s.blamed.add(least)
    if culprit is None:
        break_world(s, now, "no progress, nobody behind the others", quiet_s)
    else:
        kill(s, now, culprit, "no progress, others wait for it", quiet_s)
