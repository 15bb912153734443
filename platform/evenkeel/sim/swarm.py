"""The swarm: one seed, one random run, every invariant after every event, and progress once the faults have stopped."""

from dataclasses import dataclass
from hashlib import sha256

from evenkeel.sim.checks import ViolationError
from evenkeel.sim.fleet import Fleet
from evenkeel.sim.scenario import random_scenario

PATIENCE_S = 1800.0
"""Virtual seconds after the last fault in which a run must end."""
MAX_EVENTS = 60_000


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a seed went: "ok", "wrong" (an invariant), "stuck" (no progress) or "crash" (an exception of ours)."""

    seed: int
    verdict: str
    detail: str
    status: str
    steps: int
    generations: int
    events: int
    journal: str
    """A digest of the journal."""


def run_seed(seed: int) -> Outcome:
    """Runs the scenario of a seed to its end. Never raises: a crash is a verdict."""
    fleet = None
    try:
        fleet = Fleet(random_scenario(seed))
        verdict, detail = _run(fleet)
    except ViolationError as violation:
        verdict, detail = "wrong", str(violation)
    except (AssertionError, LookupError, ValueError, TypeError, AttributeError, RecursionError) as error:
        verdict, detail = "crash", f"{type(error).__name__}: {error}"
    return _outcome(seed, fleet, verdict, detail)


def _run(fleet: Fleet) -> tuple[str, str]:
    limit = fleet.scenario.quiet_after + PATIENCE_S
    while fleet.ended is None:
        if not fleet.clock.advance() or fleet.clock.now > limit or fleet.clock.events > MAX_EVENTS:
            mode = fleet.controller.mode if fleet.controller is not None else "no controller"
            waits = [f"{w.info.worker_id} {w.phase}" for w in fleet.workers.values() if w.alive]
            return "stuck", f"at {fleet.clock.now:.1f} s after {fleet.clock.events} events: {mode}; {waits}"
    return "ok", fleet.ended.error


def _outcome(seed: int, fleet: Fleet | None, verdict: str, detail: str) -> Outcome:
    if fleet is None:
        return Outcome(seed, verdict, detail, "", 0, 0, 0, "")
    digest = sha256(repr(fleet.journal).encode()).hexdigest()[:16]
    status = fleet.ended.status if fleet.ended is not None else ""
    worlds = len(fleet.checks.worlds)
    return Outcome(seed, verdict, detail, status, len(fleet.metrics), worlds, fleet.clock.events, digest)
