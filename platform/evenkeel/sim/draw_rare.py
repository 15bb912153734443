"""Scenarios for what happens too rarely by chance: a worker raises in a step, or dies when a checkpoint is complete."""

from dataclasses import replace
from random import Random

from evenkeel.sim.scenario import Fault, Scenario


def with_rare(scenario: Scenario, rng: Random) -> Scenario:
    """In some runs one of the two, beside whatever else they have."""
    kind, size = rng.random(), scenario.policy.wish.max_workers
    if kind < 0.03:
        moment = rng.choice(("forward", "reduce"))
        fault = Fault("exception", moment=moment, countdown=rng.randint(1, 3 * size), at_once=True)
    elif kind < 0.06 and scenario.storage is not None:
        fault = Fault("crash", moment="manifest written", countdown=rng.randint(1, 3), at_once=rng.random() < 0.5)
    else:
        return scenario
    return replace(scenario, faults=(*scenario.faults, fault))
