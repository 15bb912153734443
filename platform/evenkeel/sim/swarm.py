"""The swarm: one seed, one random run, every invariant after every event, and progress once the faults have stopped."""

import json
import sys
from argparse import ArgumentParser, ArgumentTypeError
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from multiprocessing import get_context

from evenkeel.sim.draw import random_scenario
from evenkeel.sim.fleet import Fleet
from evenkeel.sim.violation import ViolationError

PATIENCE_S = 1800.0
"""Virtual seconds after the last fault in which a run must end."""
MAX_EVENTS = 60_000


EXITS = {"ok": 0, "crash": 4, "wrong": 5, "stuck": 6}
"""Of the worst seed: a crash of ours hides what else may be wrong, so it comes first."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a seed went: "ok", "wrong" (an invariant), "stuck" (no progress) or "crash" (an exception of ours).

    Attributes:
        status: how the run ended: finished, stopped or failed; "" if it did not.
        journal: a digest of the journal.
        seen: how often what happened in it, by name.
    """

    seed: int
    verdict: str
    detail: str
    status: str
    steps: int
    generations: int
    events: int
    journal: str
    seen: Mapping[str, int]

    def __str__(self) -> str:
        return f"seed {self.seed}: {self.verdict}: {self.detail or self.status}"


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


def run_seeds(seeds: Sequence[int], processes: int | None = None) -> Iterator[Outcome]:
    """Runs the seeds, in order, over as many processes (all cores if None; 1: in this one)."""
    if processes == 1:
        yield from map(run_seed, seeds)
        return
    # Spawned, so that the caller may have threads.
    with get_context("spawn").Pool(processes) as pool:
        yield from pool.imap(run_seed, seeds, chunksize=50)


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
        return Outcome(seed, verdict, detail, "", 0, 0, 0, "", {})
    digest = sha256(repr(fleet.journal).encode()).hexdigest()[:16]
    status = fleet.ended.status if fleet.ended is not None else ""
    worlds = len(fleet.checks.worlds)
    seen = {name: count for name, count in fleet.seen.items() if count}
    return Outcome(seed, verdict, detail, status, len(fleet.metrics.votes), worlds, fleet.clock.events, digest, seen)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a range of seeds and tells how they went; the exit status is that of EXITS, 2 for a bad range."""
    parser = ArgumentParser(prog="simulate", description="Simulated runs with random faults, every invariant checked.")
    parser.add_argument("--seeds", type=_seeds, default=range(2000), metavar="A:B", help="A to B-1, or one seed")
    parser.add_argument("--jobs", type=int, default=None, help="processes; as many as there are cores")
    parser.add_argument("--first", action="store_true", help="stop at the first run that goes wrong")
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")
    options = parser.parse_args(arguments)
    verdicts: Counter[str] = Counter()
    seen: Counter[str] = Counter()
    for outcome in run_seeds(options.seeds, options.jobs):
        verdicts[outcome.verdict] += 1
        seen[outcome.status or "did not end"] += 1
        seen.update(outcome.seen.keys())
        if outcome.verdict != "ok":
            print(f"{outcome}\n  again: python jobs/simulate.py --seeds {outcome.seed}", flush=True)
            if options.first:
                break
    print("runs in which it happened:")
    for name, count in sorted(seen.items()):
        print(f"{count:8} {name}")
    print(", ".join(f"{verdicts[v]} {v}" for v in EXITS))
    if options.json:
        print(json.dumps({"seeds": len(options.seeds), "verdicts": dict(verdicts), "seen": dict(seen)}))
    return next((EXITS[v] for v in ("crash", "wrong", "stuck") if verdicts[v]), 0)


def _seeds(text: str) -> range:
    first, colon, last = text.partition(":")
    try:
        seeds = range(int(first), int(last) if colon else int(first) + 1)
    except ValueError as error:
        raise ArgumentTypeError(f"{text!r} is not a range of seeds such as 0:2000") from error
    if not seeds or seeds.start < 0:
        raise ArgumentTypeError(f"{text!r} has no seeds; a range such as 0:2000 is expected")
    return seeds


if __name__ == "__main__":
    sys.exit(main())
