"""Runs in an object store: the last lines of metrics are lost with the controller, and steps are shown again."""

from dataclasses import replace
from random import Random

from evenkeel.sim.scenario import Fault, Scenario

LINES = 16


def with_lines_lost(scenario: Scenario, rng: Random) -> Scenario:
    """Half of the stores are object stores. On some the controller dies when it has heard of some parts, not of all.

    Where one checkpoint is kept, faults lie in wait for something else.
    """
    if scenario.storage is None or scenario.storage.keep == 1:
        return scenario
    storage = replace(scenario.storage, lines_at_once=rng.choice((1, LINES)))
    if rng.random() < 0.8:
        return replace(scenario, storage=storage)
    storage = replace(storage, lines_at_once=LINES, write_s=0.5, slow=0.0, told_never=0.0)
    death = Fault("controller", moment="part written", countdown=rng.choice((1, 6, 11)))
    return replace(scenario, storage=storage, faults=(*scenario.faults, death))
