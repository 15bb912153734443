"""Scenarios in which the controller must look itself: what it is told of a checkpoint is not so."""

from dataclasses import replace
from random import Random

from evenkeel.sim.scenario import LOOKING_MOMENTS, Fault, Scenario


def with_misreads(scenario: Scenario, rng: Random) -> Scenario:
    """In some runs with checkpoints workers cannot read what is whole, or a manifest is there that was said not to be;
    and the state is lost, so that it matters. Not where nobody can read anything."""
    storage = scenario.storage
    if storage is None or storage.damaged == 1.0 or scenario.late_reports or rng.random() < 0.4:
        return scenario
    policy = replace(scenario.policy, checkpoint_every=1, last_step=max(6, scenario.policy.last_step))
    faults = scenario.faults
    if rng.random() < 0.5:
        storage = replace(storage, misreads=rng.choice((0.1, 0.3, 0.3, 1.0)))
        faults += (Fault("all", moment="manifest written", countdown=rng.randint(2, 4)),)
    else:
        storage = replace(storage, commit_fails=0.8, arrives=rng.choice((0.3, 0.8)))
        policy = replace(policy, max_checkpoint_failures=None)
        faults += (Fault(rng.choice(("all", "stage")), moment="manifest refused", countdown=rng.randint(1, 3)),)
    if rng.random() < 0.3:
        faults += (Fault("controller", moment=rng.choice(LOOKING_MOMENTS), countdown=rng.choice((1, 6))),)
    return replace(scenario, policy=policy, storage=storage, faults=faults)
