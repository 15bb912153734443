"""Scenarios in which workers are unequal, or slow for a time, and work moves between them."""

from dataclasses import replace
from random import Random

from evenkeel.plan.layout import Wish
from evenkeel.sim.pace import Paces
from evenkeel.sim.scenario import Fault, Scenario


def with_paces(scenario: Scenario, rng: Random) -> Scenario:
    """In some runs work is shared out by measured speed: most of them with some workers that are slow, and with faults
    when a world is formed anew for that."""
    if rng.random() < 0.8 or scenario.policy.mirror_every or scenario.flips:
        return scenario
    wish = scenario.policy.wish
    if rng.random() < 0.6:
        data, pipeline = rng.choice(((2, 1), (2, 1), (3, 1), (1, 2), (2, 2), (1, 3)))
        size = data * pipeline * (wish.tensor or 1)
        wish = Wish(data, pipeline, wish.tensor, rng.choice((1, size)), size)
    policy = replace(
        scenario.policy,
        rebalance=True,
        wish=wish,
        micro_batches=wish.max_workers * rng.choice((2, 4, 8)),
        last_step=rng.choice((24, 30, 48)),
    )
    slow = rng.choice((0.0, 0.3, 0.3, 0.6))
    factors = rng.choice(((2.0,), (4.0,), (1.3, 3.0), (30.0,)))
    if rng.random() < 0.25:
        # Some are of no use to anybody.
        data = rng.choice((3, 4))
        wish, slow, factors = Wish(data, 1, 1, 1, data), 0.4, (30.0,)
        policy = replace(policy, wish=wish, micro_batches=2 * data, copies=None)
    paces = Paces(slow, factors, outliers=rng.choice((0.0, 0.2)), slow_links=rng.choice((0.0, 0.0, 0.3)))
    size = wish.max_workers
    faults = scenario.faults if rng.random() < 0.4 else ()
    if rng.random() < 0.4:
        # When the first world makes room for the second, mostly: each member of each comes to each of these moments.
        kind = rng.choice(("crash", "crash", "controller", "hang"))
        moment = rng.choice(("abort", "abort", "regroup", "joined"))
        countdown = rng.randint(1, size) + (0 if moment == "abort" else size)
        if kind == "controller":
            moment, countdown = rng.choice(("Aborting", "Settling")), 1
        faults += (Fault(kind, moment=moment, countdown=countdown, seconds=rng.uniform(1.0, 10.0)),)
    if rng.random() < 0.3:
        seconds = rng.choice((1.0, 5.0, 20.0)) * scenario.step_s
        faults += (Fault("slow", at=scenario.start_s + rng.uniform(2.0, 10.0), seconds=seconds),)
    return replace(scenario, policy=policy, paces=paces, faults=faults)
