"""How fast simulated workers are, in runs that share work out by measured speed; and what they measure of it."""

from dataclasses import dataclass
from random import Random
from statistics import median
from typing import TYPE_CHECKING

from evenkeel.control.speeds import SAMPLES
from evenkeel.core.layout import Layout
from evenkeel.core.vote import Timing
from evenkeel.core.world import World
from evenkeel.plan.speeds import Speeds

if TYPE_CHECKING:
    from evenkeel.sim.worker import SimWorker

MESSAGE_BYTES = 1_000_000
"""That a stage receives for a micro-batch, both ways."""
LINK = 1e9
"""Bytes per second of a link that is not slow."""


@dataclass(frozen=True, slots=True)
class Paces:
    """What the workers of a run are like.

    Attributes:
        slow: how many of them take longer, by a factor of `factors`.
        outliers: how often one sample of a worker is several times off, for no reason, and those about it are not.
        slow_links: how many of them receive everything slowly.
    """

    slow: float
    factors: tuple[float, ...]
    outliers: float
    slow_links: float


class Pace:
    """One worker's. All that chance decides has sources of its own, so that it leaves the rest of a seed as it was."""

    def __init__(self, worker: "SimWorker") -> None:
        self._worker = worker
        scenario, name = worker.fleet.scenario, worker.info.worker_id
        self.paces = scenario.paces
        self._rng = Random(f"{scenario.seed} pace {name}")
        self.factor, self.rate = 1.0, LINK
        if self.paces is not None:
            self.factor = self._rng.choice(self.paces.factors) if self._rng.random() < self.paces.slow else 1.0
            self.rate = LINK / 20 if self._rng.random() < self.paces.slow_links else LINK
        self._passes: list[float] = []
        self._since_odd = SAMPLES

    def work_s(self, world: World) -> float:
        """Virtual seconds of the passes of a step, without what slows the worker for a time."""
        scenario = self._worker.fleet.scenario
        if self.paces is None:
            return scenario.step_s
        place = world.layout.places[self._worker.info.worker_id]
        pipeline = world.layout.pipelines[place.pipeline]
        speeds = true_speeds(self._worker, world.layout)
        pass_s = speeds.stage_s(pipeline.stages[place.stage])
        if self._worker.step > world.base.step + 1:
            self._passes.append(pass_s * self._worker.slow * self._rng.uniform(0.92, 1.08))
        return pipeline.share * pass_s

    def timing(self, world: World) -> Timing:
        """What it tells in a vote."""
        me = self._worker.info.worker_id
        place = world.layout.places[me]
        stages = world.layout.pipelines[place.pipeline].stages
        stage = stages[place.stage]
        passes, self._passes = self._passes, []
        pass_s = median(passes) * (6 if self._odd() else 1) if passes else 0.0
        costs = costs_of(self._worker)[stage.start : stage.stop]
        layers = tuple(pass_s * cost / sum(costs) for cost in costs) if pass_s and not place.tp else ()
        source = stages[place.stage - 1].members[place.tp] if place.stage else None
        return Timing(me, pass_s, self.receive_s(world.layout), layers, source, self.rate if source else 0.0)

    def receive_s(self, layout: Layout) -> float:
        place = layout.places[self._worker.info.worker_id]
        return self._worker.fleet.scenario.step_s * 1e-3 * LINK / self.rate if place.stage else 0.0

    def _odd(self) -> bool:
        """Not twice within what the controller takes for another speed: that would be one."""
        self._since_odd += 1
        odd = self.paces is not None and self._rng.random() < self.paces.outliers and self._since_odd > SAMPLES
        self._since_odd = 0 if odd else self._since_odd
        return odd


def costs_of(worker: "SimWorker") -> tuple[float, ...]:
    """What the layers truly cost; the model's word is a little off."""
    return tuple(layer.cost + 0.1 for layer in worker.fleet.scenario.policy.model.layers)


def true_speeds(worker: "SimWorker", layout: Layout) -> Speeds:
    """Such that a step takes about its `step_s` where all are equal."""
    fleet = worker.fleet
    policy, costs = fleet.scenario.policy, costs_of(worker)
    members = policy.wish.max_workers / (policy.wish.tensor or 1)
    unit_s = fleet.scenario.step_s * members / (policy.micro_batches * sum(costs))
    workers = {w: fleet.workers[w].pace for w in layout.members}
    paces = {w: unit_s * pace.factor for w, pace in workers.items()}
    return Speeds(costs, paces, {w: pace.receive_s(layout) for w, pace in workers.items()})
