"""Runs of the fault matrix on real processes, several cells in one run; each cell is judged by itself.

What a run commits must be what a run without faults commits, so the last parameters judge all of its cells, and events
and journal judge each.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from left import alive, nothing_left, shared_memory
from matrix import FIRST, PAIRS, SPACING, Cell, Result, Setting
from tiny import Tiny, difference
from torch import Tensor

from evenkeel.control.messages import Event
from evenkeel.control.policy import Policy
from evenkeel.core.ids import WorkerId
from evenkeel.core.world import World
from evenkeel.engine.faults import RECOVERY, FaultPlan, once_in
from evenkeel.engine.local import LocalRun, Outcome
from evenkeel.engine.model import model_shape
from evenkeel.plan.layout import Wish

GATE = 1000
"""A fault with this index or above is none: its target waits there until the gate of this number is opened."""
TOLERANCE = 1e-10


@dataclass(frozen=True)
class Held(Tiny):
    """A tiny job with gates, and with faults that wait for each other.

    Attributes:
        together: indices of faults that fire at the same time.
    """

    together: tuple[tuple[int, ...], ...] = ()

    def fault_once(self, index: int) -> bool:
        if index >= GATE:
            self._await(f"open-{index - GATE}")
            return False
        if not once_in(self.folder)(index):
            return False
        for partners in self.together:
            if index in partners:
                for partner in partners:
                    self._await(f"fault-{partner}")
        return True

    def open_gate_of(self, cell: int) -> None:
        (self.folder / f"open-{cell}").touch()

    def _await(self, name: str) -> None:
        while not (self.folder / name).exists():
            time.sleep(0.001)


def gate_of(cell: int, spacing: int) -> int:
    """The step in which the run is held until the cell may begin; earlier where the world has to grow again first."""
    return FIRST + spacing * cell - (1 if spacing == SPACING else spacing - 3)


def make_job(folder: Path, setting: Setting, cells: Sequence[Cell], *, spacing: int = SPACING, **options: Any) -> Held:
    faults: list[FaultPlan] = []
    together: list[tuple[int, ...]] = []
    for number, cell in enumerate(cells):
        step = FIRST + spacing * number
        faults.append(FaultPlan(GATE + number, gate_of(number, spacing), "forward", "rank:0", "exception"))
        if cell.trigger is not None:
            faults.append(FaultPlan(_next(faults), step, "backward", f"rank:{cell.trigger}", "kill"))
        first = _next(faults)
        together.append(tuple(range(first, first + len(cell.victims))))
        for rank in cell.victims:
            faults.append(FaultPlan(_next(faults), step, cell.phase, f"rank:{rank}", cell.kind))
    defaults = {"precision": "fp32", "steps": setting.steps, "tied": setting.tied}
    return Held(folder, faults=tuple(faults), together=tuple(together), **(defaults | options))


def _next(faults: Sequence[FaultPlan]) -> int:
    return sum(fault.index < GATE for fault in faults)


@dataclass
class Watcher:
    """Opens the gate of the next cell once the run has healed and enough workers stand by; looks at processes then.

    Attributes:
        ready: how many workers must be alive, spares included.
        opened: gates so far.
        shared: files of shared memory that any member was found with.
        missing: members that were never lost, but were found gone, or with another pid.
    """

    job: Held
    cells: int
    spacing: int
    ready: int
    opened: int = 0
    shared: set[str] = field(default_factory=set)
    missing: list[str] = field(default_factory=list)

    def __call__(self, run: LocalRun, _: Event) -> None:
        outcome = run.outcome
        if outcome.status:
            self._look(run)
        elif self.opened < self.cells and outcome.metrics:
            lost = {line.fields["worker_id"] for line in outcome.named("worker_lost")}
            step = gate_of(self.opened, self.spacing) - 1
            if outcome.metrics[-1].vote.step >= step and len(outcome.ready.keys() - lost) >= self.ready:
                self._look(run)
                self.job.open_gate_of(self.opened)
                self.opened += 1

    def _look(self, run: LocalRun) -> None:
        lost = {line.fields["worker_id"] for line in run.outcome.named("worker_lost")}
        for info in run.outcome.worlds[-1].members:
            if info.worker_id not in lost:
                if not alive(info.pid) or run.fleet.pid(info.worker_id) != info.pid:
                    self.missing.append(info.worker_id)
                else:
                    self.shared |= shared_memory(info.pid)


@dataclass(frozen=True)
class Truth:
    """What a run without faults commits: values of every vote (but its generation), and the last parameters."""

    votes: list[tuple[float, ...]]
    params: dict[str, Tensor]


def policy(job: Tiny, setting: Setting, spares: int) -> Policy:
    wish = Wish(max_workers=setting.workers, min_workers=1, **setting.wish)
    return Policy(model_shape(job.model()), wish, job.make_settings().micro_batches, job.steps, spares=spares)


def undisturbed(folder: Path, setting: Setting, **options: Any) -> Truth:
    job = make_job(folder, setting, (), **options)
    outcome = LocalRun(job, policy(job, setting, 0)).run()
    assert (outcome.status, outcome.error) == ("finished", "")
    return Truth([line.vote.values for line in outcome.metrics], job.final())


def play(folder: Path, setting: Setting, cells: Sequence[Cell], truth: Truth, **options: Any) -> list[Result]:
    """Runs all cells, each with a spare for every death: the layout stays, and what is committed is bitwise equal."""
    job = make_job(folder, setting, cells, **options)
    spares = max(1, *(len(cell.deaths) for cell in cells))
    with nothing_left():
        return play_cells(job, setting, cells, truth, Watcher(job, len(cells), SPACING, setting.workers + spares))


def play_cells(
    job: Held, setting: Setting, cells: Sequence[Cell], truth: Truth, watcher: Watcher
) -> list[Result]:
    run = LocalRun(job, policy(job, setting, watcher.ready - setting.workers), watch=watcher)
    outcome = run.run()
    problem = _problem_of_run(job, outcome, run, watcher) or difference_from(truth, job, outcome)
    return [judge(cell, FIRST + SPACING * i, outcome, problem, replaced=True) for i, cell in enumerate(cells)]


def play_without_spares(folder: Path, setting: Setting, cells: Sequence[Cell]) -> list[Result]:
    """Runs all cells; after each the world is smaller until a new worker comes. In fp64, against one plain loop."""
    spacing = 2 * SPACING
    steps = FIRST + spacing * len(cells)
    job = make_job(folder, setting, cells, spacing=spacing, precision="fp64", steps=steps)
    starts = [FIRST + spacing * i + 1 for i, cell in enumerate(cells) for _ in cell.deaths]
    watcher = Watcher(job, len(cells), spacing, setting.workers)
    with nothing_left():
        not_before = {setting.workers + i: step for i, step in enumerate(starts)}
        run = LocalRun(job, policy(job, setting, 0), watch=watcher, not_before=not_before)
        outcome = run.run()
    problem = _problem_of_run(job, outcome, run, watcher)
    if not problem:
        losses, params = job.reference()
        if not all(abs(a - b) <= TOLERANCE * abs(b) for a, b in zip(outcome.losses, losses, strict=True)):
            problem = "other losses than the plain loop"
        elif difference(job.final(), params) > TOLERANCE:
            problem = "other parameters than the plain loop"
    return [judge(cell, FIRST + spacing * i, outcome, problem, replaced=False) for i, cell in enumerate(cells)]


def _problem_of_run(job: Held, outcome: Outcome, run: LocalRun, watcher: Watcher) -> str:
    """What is wrong with the run as a whole, "" if nothing is."""
    steps = [line.vote.step for line in outcome.metrics]
    pids = [info.pid for info in outcome.ready.values()]
    if outcome.status != "finished":
        return f"{outcome.status}: {outcome.error}"
    if steps != list(range(1, job.steps + 1)):
        return f"committed steps are {steps}"
    if watcher.missing:
        return f"not there any more, but never lost: {watcher.missing}"
    if any(alive(pid) for pid in pids):
        return "processes are left"
    if any(Path(name).exists() for name in watcher.shared):
        return f"shared memory is left: {watcher.shared}"
    return ""


def judge(cell: Cell, step: int, outcome: Outcome, problem: str, *, replaced: bool) -> Result:
    """One cell, by what the run has written: who was lost, who took which place, what was committed from which base."""
    incidents = [line for line in outcome.named("incident") if step <= line.step <= step + 1]
    incidents = [line for line in incidents if line.fields["cause"] != "pause"]
    seconds = sum(line.fields["total"] for line in incidents)
    redone = len(outcome.metrics) - len({line.vote.step for line in outcome.metrics})
    result = Result(cell.kind, cell.phase, cell.target, "", seconds, redone)
    found = problem or _problem_of_cell(cell, step, outcome, len(incidents), replaced)
    return Result(cell.kind, cell.phase, cell.target, found, result.heal_s, result.redone)


def _problem_of_cell(cell: Cell, step: int, outcome: Outcome, incidents: int, replaced: bool) -> str:
    if incidents != 1:
        return f"{incidents} incidents instead of one"
    before = [world for world in outcome.worlds if world.base.step < step - 1][-1]
    after = [world for world in outcome.worlds if world.base.step <= step][-1]
    dead = _dead(cell, before, outcome)
    lost = {line.fields["worker_id"] for line in outcome.named("worker_lost") if step - 1 <= line.step <= step}
    if lost != dead:
        return f"lost {sorted(lost)} instead of {sorted(dead)}"
    if after.generation == before.generation:
        return "no new world"
    if after.base.step == step and cell.phase not in ("after_vote", "commit"):
        return f"step {step} was committed although its vote cannot have been complete"
    for line in outcome.metrics:
        if step - SPACING < line.vote.step <= step + 1:
            expected = after.generation if line.vote.step > after.base.step else before.generation
            if line.vote.generation != expected:
                return f"step {line.vote.step} was committed by generation {line.vote.generation}, not {expected}"
    return _problem_of_places(before, after, dead, replaced)


def _dead(cell: Cell, before: World, outcome: Outcome) -> set[WorkerId]:
    """In a recovery victims are hit as members of the world that is formed, in which ranks may be others."""
    if cell.trigger is None:
        return {before.layout.members[rank] for rank in cell.deaths}
    formed = next(world for world in outcome.worlds if world.generation > before.generation)
    victims = [rank for rank in cell.deaths if rank != cell.trigger]
    return {before.layout.members[cell.trigger], *(formed.layout.members[rank] for rank in victims)}


def _problem_of_places(before: World, after: World, dead: set[WorkerId], replaced: bool) -> str:
    pids = {info.worker_id: info.pid for info in before.members}
    survivors = [w for w in before.layout.members if w not in dead]
    if any(w not in after.layout.places for w in survivors):
        return "a survivor lost its place"
    if any(pids[info.worker_id] != info.pid for info in after.members if info.worker_id in pids):
        return "a survivor has another pid"
    if not replaced:
        return "" if after.size == before.size - len(dead) else f"{after.size} workers after {before.size}"
    if any(after.layout.places[w] != before.layout.places[w] for w in survivors):
        return "a survivor has another place"
    fresh = [info for info in after.members if info.worker_id not in pids]
    return "" if len(fresh) == len(dead) and not {f.pid for f in fresh} & set(pids.values()) else "who is new?"


def play_lost(folder: Path, setting: Setting, kind: str, phase: str) -> Result:
    """The only two holders of some slices die together: the run must end and name what is lost."""
    first, second = setting.both
    hit, trigger = ((second,), first) if phase == RECOVERY else (setting.both, None)
    cell = Cell(kind, phase, "both holders", hit, trigger)
    job = make_job(folder, setting, [cell], steps=FIRST + 4)
    watcher = Watcher(job, 1, SPACING, setting.workers + 1)
    with nothing_left():
        run = LocalRun(job, policy(job, setting, 1), watch=watcher)
        outcome = run.run()
    problem = ""
    committed = [line.vote.step for line in outcome.metrics]
    members = outcome.worlds[0].layout.members
    lost = {line.fields["worker_id"] for line in outcome.named("worker_lost")}
    last = committed[-1]
    if outcome.status != "failed":
        problem = f"{outcome.status}, not failed"
    elif f"step {last} is lost: nobody alive holds param/" not in outcome.error:
        problem = outcome.error
    elif last not in (FIRST - 1, FIRST) or committed != list(range(1, last + 1)):
        problem = f"committed steps are {committed}"
    elif lost != {members[rank] for rank in cell.deaths}:
        problem = f"lost {sorted(lost)}"
    elif any(alive(info.pid) for info in outcome.ready.values()):
        problem = "processes are left"
    return Result(kind, phase, "both holders", problem)


def play_spare(folder: Path, kind: str) -> list[Result]:
    """A spare is hit while idle; later one is hit when it has been given a place, and another one has to take it.

    An idle spare that was stopped is noticed when it does not come to the world that it is given a place in.
    """
    truth = undisturbed(_made(folder / "truth"), PAIRS)
    idle, joining = FIRST, FIRST + SPACING
    faults = (
        FaultPlan(0, idle, "forward", "spare", kind),
        FaultPlan(1, joining, "backward", "rank:1", "kill"),
        FaultPlan(2, joining, RECOVERY, "spare", kind),
        FaultPlan(GATE, idle - 1, "forward", "rank:0", "exception"),
        FaultPlan(GATE + 1, joining - 1, "forward", "rank:0", "exception"),
    )
    job = replace(make_job(_made(folder / "run"), PAIRS, ()), faults=faults)
    watcher = Watcher(job, 2, SPACING, PAIRS.workers + 2)
    with nothing_left():
        run = LocalRun(job, policy(job, PAIRS, 2), watch=watcher)
        outcome = run.run()
    problem = _problem_of_run(job, outcome, run, watcher) or difference_from(truth, job, outcome)
    moments = (("while idle", idle), (RECOVERY, joining))
    return [_judge_spare(kind, phase, step, outcome, problem) for phase, step in moments]


def _judge_spare(kind: str, phase: str, step: int, outcome: Outcome, problem: str) -> Result:
    incidents = [line for line in outcome.named("incident") if step <= line.step <= step + 1]
    lost = {line.fields["worker_id"] for line in outcome.named("worker_lost") if step - 1 <= line.step <= step}
    members = outcome.worlds[0].layout.members
    unnoticed = kind == "stop" and phase != RECOVERY
    others = {"while idle": 0 if unnoticed else 1, RECOVERY: 2 if kind == "stop" else 1}[phase]
    if not problem and len(incidents) != (phase == RECOVERY):
        problem = f"{len(incidents)} incidents"
    triggers = set(members[1:2] if incidents else ())
    if not problem and (len(lost - set(members)), lost & set(members)) != (others, triggers):
        problem = f"lost {sorted(lost)}"
    return Result(kind, phase, "spare", problem, sum(line.fields["total"] for line in incidents))


def _made(folder: Path) -> Path:
    folder.mkdir()
    return folder


def difference_from(truth: Truth, job: Tiny, outcome: Outcome) -> str:
    """Whether anything that was committed differs from a run without faults, in any bit."""
    if [line.vote.values for line in outcome.metrics] != truth.votes:
        return "another vote than without faults"
    final = job.final()
    if final.keys() != truth.params.keys() or not all(torch.equal(final[name], truth.params[name]) for name in final):
        return "other parameters than without faults"
    return ""
