"""Scenarios in which bits flip in the memory of workers."""

from dataclasses import replace
from random import Random

from evenkeel.plan.layout import Wish
from evenkeel.sim.scenario import Fault, Scenario, Storage


def with_flips(scenario: Scenario, rng: Random) -> Scenario:
    """In some runs bits flip in the memory of workers, most of which have others that hold the same."""
    if rng.random() < 0.6 or scenario.policy.mirror_every or scenario.storage is not None or scenario.late_reports:
        return scenario
    # A source of its own, so that it leaves the seeds found earlier as they were.
    if Random(f"{scenario.seed} stage").random() < 0.1:
        return _stage_dies_uncompared(scenario, rng)
    if rng.random() < 0.5:
        return rng.choice((_odd_copy_saved, _odd_copy_survives, _writer_dies_uncompared))(scenario, rng)
    policy = replace(scenario.policy, compare_every=rng.choice((1, 2, 3, 10)))
    if rng.random() < 0.8:
        data, pipeline = rng.choice((2, 3, 3, 4)), rng.choice((1, 1, 2))
        wish = Wish(data, pipeline, 1, rng.choice((1, data * pipeline)), data * pipeline)
        policy = replace(policy, wish=wish, micro_batches=max(policy.micro_batches, data * pipeline), last_step=9)
    if rng.random() < 0.7:
        policy = replace(policy, checkpoint_every=rng.choice((1, 1, 2, 3)))
        fails, twice = rng.choice((0.0, 0.0, 0.1)), rng.choice((0.0, 0.2))
        storage = Storage(0.01, 0.01, part_fails=fails, commit_fails=fails, told_twice=twice, keep=1)
        scenario = replace(scenario, storage=storage)
    faults = tuple(_flip(rng) for _ in range(rng.choice((1, 1, 2, 3))))
    if rng.random() < 0.4:
        # The controller dies just when it was decided what becomes of the copies, or when that is carried out.
        faults += (Fault("controller", moment=rng.choice(("Settling", "Settling", "loading")), countdown=1),)
        return replace(scenario, policy=policy, faults=faults)
    return replace(scenario, policy=policy, faults=(*scenario.faults, *faults))


def _odd_copy_saved(scenario: Scenario, rng: Random) -> Scenario:
    """Of three, in a version that is saved. It is found out; then everybody dies."""
    flip = Fault("flip", moment="commit", countdown=6 + rng.randint(1, 3), at_once=True)
    death = Fault("all", moment="joined", countdown=3 + rng.randint(1, 3), at_once=True)
    return _copies(scenario, 3, flip, death)


def _odd_copy_survives(scenario: Scenario, rng: Random) -> Scenario:
    """Of three. The controller dies when it has found out which, perhaps before it has killed its holder."""
    flip = Fault("flip", moment="commit", countdown=rng.randint(1, 9), at_once=True)
    scenario = _copies(scenario, 3, flip, Fault("controller", moment="Settling", countdown=1))
    return replace(scenario, policy=replace(scenario.policy, checkpoint_every=None, compare_every=2), storage=None)


def _writer_dies_uncompared(scenario: Scenario, rng: Random) -> Scenario:
    """Of two copies: a wrong one is written, to the first checkpoint or the second, and its holder dies before a vote
    compares it; later copies differ."""
    before = 6 * (scenario.seed % 2)
    flip = Fault("flip", moment="commit", countdown=before + 4 + rng.randint(1, 2), at_once=True)
    death = Fault("crash", moment="reduce", countdown=before + 6 + rng.randint(1, 2), at_once=True)
    another = Fault("flip", moment="commit", countdown=before + 6 + rng.randint(1, 2), at_once=True)
    return _copies(scenario, 2, flip, death, another)


def _stage_dies_uncompared(scenario: Scenario, rng: Random) -> Scenario:
    """Of two copies of two stages: a wrong one is written, to the first checkpoint or the second, and all who hold one
    stage die before a vote compares it. So a world is read from there; who holds the other stage keeps that."""
    before = 12 * (scenario.seed % 2)
    flip = Fault("flip", moment="commit", countdown=before + 8 + rng.randint(1, 4), at_once=True)
    death = Fault("stage", moment="reduce", countdown=before + 12 + rng.randint(1, 4), at_once=True)
    scenario = _copies(scenario, 2, flip, death)
    wish = Wish(2, 2, 1, 4, 4)
    return replace(scenario, policy=replace(scenario.policy, wish=wish))


def _copies(scenario: Scenario, copies: int, *faults: Fault) -> Scenario:
    """So many of everything; every third version is saved, and compared in the step after it."""
    wish = Wish(copies, 1, 1, copies, copies)
    policy = replace(scenario.policy, wish=wish, micro_batches=max(4, scenario.policy.micro_batches), last_step=9)
    policy = replace(policy, spares=1, checkpoint_every=3, compare_every=10, copies=None)
    storage = Storage(0.01, 0.01, keep=1)
    return replace(scenario, policy=policy, faults=faults, storage=storage, skew=1.0, nodes=4, step_s=0.1)


def _flip(rng: Random) -> Fault:
    often, seldom = ("forward", "reduce", "vote", "commit"), ("joined", "saving", "manifest written")
    moment = rng.choice((*often, *often, *seldom))
    countdown = rng.randint(1, 15 if moment in often else 5)
    return Fault("flip", moment=moment, countdown=countdown, at_once=rng.random() < 0.6)
