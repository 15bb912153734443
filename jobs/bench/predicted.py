"""A real run with many kills, and what the simulator says of it beforehand, with costs measured on another run."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import inf
from pathlib import Path
from random import Random
from statistics import fmean

from bench.lab import say
from bench.process import BenchError
from bench.sides import product
from bench.work import Work
from evenkeel.control import messages as m
from evenkeel.core.codec import load
from evenkeel.core.model import LayerShape, ModelShape, ParamShape
from evenkeel.observe.incident import unplanned
from evenkeel.sim.goodput.pace import Pace
from evenkeel.sim.goodput.record import describe
from evenkeel.sim.goodput.run import Run
from evenkeel.sim.goodput.setting import Setting
from evenkeel.store.errors import StoreError
from evenkeel.store.run_directory import RunDirectory
from evenkeel.tools.measured import Measured, measured_in

KILLS = 20
WORKERS = 4
SOON, LATE = (5, 8), (90, 130)
"""Steps from one kill to the next: sooner than a worker starts, or later than two do."""
PAIRS = 0.4
"""How often a kill is soon followed by another: the first takes the spare, so the second makes the world smaller."""
LIMIT_S = 1500.0
FOREVER = 1e9
BEYOND, OWN_BEYOND = 1.5, 1.25
"""The longer over the shorter of what a run took beyond its steps at full strength (repairs, steps done again or with
fewer workers, checkpoints) and what was predicted of that: from the other run's costs, and from its own. Steps are most
of a run, so its whole time tells little of these; and the machine differs from run to run more than the simulator."""


@dataclass(frozen=True, slots=True)
class Schedule:
    """Who is killed in the backward pass of which step: (step, rank), in order; and the run's last step."""

    kills: tuple[tuple[int, int], ...]
    steps: int

    def work(self) -> Work:
        """2 pipelines of 2 stages and a spare, with checkpoints; that others use the machine too is no decision."""
        faults = tuple(
            {"step": step, "phase": "backward", "target": f"rank:{rank}", "kind": "kill"} for step, rank in self.kills
        )
        return Work(
            self.steps, data=2, pipeline=2, spares=1, fewest=2, batch=(8, 1), save_every=100, rebalance=False,
            faults=faults,
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Real:
    """What came of a real run.

    Attributes:
        total_s: from the first committed step to the last one.
        beyond_s: of these, what was more than `steps` at full strength take.
        decisions: of its journal; see comparable.
        offset_s: mean time from the commit before a kill to the kill.
    """

    total_s: float
    beyond_s: float
    decisions: tuple[str, ...]
    offset_s: float
    measured: Measured


@dataclass(frozen=True, slots=True)
class Comparison:
    """A prediction against what came: `apart` is the longer time over the shorter one, at least 1."""

    apart: float
    words: str


def schedule(seed: int, kills: int = KILLS) -> Schedule:
    """Drawn from the seed."""
    random, found, step = Random(seed), [], 0
    while len(found) < kills:
        soon = bool(found) and not _soon(found) and random.random() < PAIRS
        step += random.randint(*(SOON if soon else LATE))
        found.append((step, random.randrange(WORKERS)))
    return Schedule(tuple(found), step + LATE[1])


def _soon(kills: Sequence[tuple[int, int]]) -> bool:
    """Whether the last kill came soon after the one before."""
    return len(kills) > 1 and kills[-1][0] - kills[-2][0] <= SOON[1]


def against_real(folder: Path, number: int, kills: int = KILLS) -> Comparison:
    """Measures costs on a run with one schedule, and predicts another run, with another one.

    Raises:
        BenchError: if a run fails, decides otherwise than predicted, or takes another time beyond its steps.
    """
    known = real(schedule(2 * number + 1, kills), folder / "known")
    coming = schedule(2 * number + 2, kills)
    total_s, decisions = predicted(coming, known)
    beyond_s = total_s - _steps_s(coming, known)
    say(f"predicted: {total_s:.1f} s, {beyond_s:.1f} s of them beyond the steps")
    found = real(coming, folder / "coming")
    check_decisions(decisions, found.decisions)
    own_s = predicted(coming, found)[0] - _steps_s(coming, found)
    beyond = f"{found.beyond_s:.1f} s beyond the steps, predicted {beyond_s:.1f} s, from its own costs {own_s:.1f} s"
    for what, said_s, most in (("predicted", beyond_s, BEYOND), ("its own costs'", own_s, OWN_BEYOND)):
        if not apart(said_s, found.beyond_s) <= most:
            raise BenchError(f"{beyond}: {what} is more than {most} times apart")
    times = f"{found.total_s:.1f} s, predicted {total_s:.1f} s, from a run of {known.total_s:.1f} s; {beyond}"
    words = f"{times}\n{len(decisions)} decisions in {coming.steps} steps, all as predicted"
    return Comparison(apart(total_s, found.total_s), words)


def _steps_s(plan: Schedule, known: Real) -> float:
    """Of all steps from the first to the last at full strength."""
    return (plan.steps - 1) * known.measured.step_s


def apart(a: float, b: float) -> float:
    """The larger over the smaller; inf if one of them is not positive."""
    return max(a, b) / min(a, b) if min(a, b) > 0 else inf


def real(plan: Schedule, folder: Path) -> Real:
    """Runs it with jobs/train.py. Raises BenchError if that fails, or a kill does not happen."""
    folder.mkdir()
    steps = product(plan.work(), limit_s=LIMIT_S).run(folder)
    assert steps.run is not None
    directory = RunDirectory.at(str(steps.run))
    killed, incidents = directory.fault_times(), unplanned(directory.events())
    if not len(killed) == len(incidents) == len(plan.kills):
        counts = f"{len(killed)} kills and {len(incidents)} incidents"
        raise BenchError(f"{counts}, where {len(plan.kills)} were planned")
    try:
        found = measured_in(str(steps.run))
    except StoreError as error:
        raise BenchError(str(error)) from None
    before = [steps.ends[step - 1] for step, _ in plan.kills]
    offset_s = max(0.0, fmean(kill - end for kill, end in zip(killed, before, strict=True)))
    entries = [load(entry, m.Entry) for entry in directory.journal().read_all()]
    decisions = comparable([describe(entry) for entry in entries if not isinstance(entry, m.RunEnded)])
    total_s = steps.ends[steps.last] - steps.ends[1]
    beyond_s = total_s - (steps.last - 1) * found.step_s
    say(f"{len(killed)} kills in {total_s:.1f} s, {beyond_s:.1f} s of them beyond the steps; {found}")
    return Real(total_s, beyond_s, decisions, offset_s, found)


def predicted(plan: Schedule, known: Real) -> tuple[float, tuple[str, ...]]:
    """(seconds from the first step to the last, decisions) of a run that was only simulated.

    Raises:
        BenchError: if the simulated run does not get there.
    """
    run = Run(_setting(known))
    if not run.until_step(1, FOREVER):
        raise BenchError("the simulated run does not begin")
    began = run.now
    for step, rank in plan.kills:
        if not run.until_step(step - 1, FOREVER) or run.step != step - 1:
            raise BenchError(f"the simulated run does not come to step {step}, but to {run.step + 1} {run.ended}")
        run.until(run.now + known.offset_s)
        run.lose(rank)
    if not run.until_step(plan.steps, FOREVER):
        raise BenchError(f"the simulated run does not come to its end: {run.ended}")
    took = run.now - began
    return took, comparable([what for _, what in run.outcome().decisions])


def check_decisions(ours: Sequence[str], theirs: Sequence[str]) -> None:
    """Raises BenchError for the first decision that was another one than predicted."""
    for number, (a, b) in enumerate(zip([*ours, "nothing"], [*theirs, "nothing"], strict=False), 1):
        if a != b:
            raise BenchError(f"decision {number} was {b!r}; predicted was {a!r}")


def comparable(decisions: Sequence[str]) -> tuple[str, ...]:
    """What must be the same, which is all of each but for one thing: at which step a worker is ready, and so a pause is
    made for it, differs by how long its start took."""
    said = [what for what in decisions if what]
    pauses = [what.endswith(": pause") for what in said]
    of_pause = [a or b for a, b in zip(pauses, [*pauses[1:], False], strict=True)]
    return tuple(re.sub(r"step \d+", "step", x) if paused else x for x, paused in zip(said, of_pause, strict=True))


def _setting(known: Real) -> Setting:
    """The work of Schedule. Of the model only its layers matter, as no cost here depends on bytes."""
    layers = tuple(LayerShape(f"l{i}", (ParamShape(f"l{i}.w", (1024,)),)) for i in range(6))
    plain = Setting(
        nodes=tuple(f"node{i}" for i in range(WORKERS + 1)), devices_per_node=1, model=ModelShape(layers), data=2,
        pipeline=2, tensor=1, micro_batches=8, step_s=known.measured.step_s, tokens_per_step=1.0, duration_s=FOREVER,
        costs=known.measured.costs, min_workers=2, spares=1, checkpoint_every=100, per_node=False,
    )  # fmt: skip
    by_size, shares = known.measured.by_size, Pace(plain)
    return replace(plain, pace=lambda layout: by_size.get(len(layout.members)) or shares.of(layout, ()))
