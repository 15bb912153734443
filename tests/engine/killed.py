"""Runs in which workers, several, all of them and the controller are killed at one moment after another; and a judge.

The last complete checkpoint stays whole, the run goes back only if nobody alive holds the state, no further than it
must, and what is committed in the end is what a run without faults commits.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from killable import VISIBLE, KillableRun, Stop, Stops, Struck
from left import nothing_left
from matrix import Result
from safetensors.torch import load as load_tensors
from tiny import difference
from torch import Tensor

from evenkeel.config import load_config
from evenkeel.engine.faults import LOAD, MIRROR_PHASES
from evenkeel.runtime.prepare import Prepared, prepare
from evenkeel.runtime.run import write_beginning
from evenkeel.store.run_directory import RunDirectory

EVERY = 4
"""Steps between two checkpoints where nothing is mirrored."""
TOLERANCE = 1e-10
SAME = ("step", "loss", "grad_norm", "lr", "tokens", "samples")


@dataclass(frozen=True)
class Setting:
    """A layout, and how many steps its runs have: one number for all, so that one run without faults serves them all.

    Attributes:
        holders: each of them the ranks that are the only holders of some slices.
        mirror_every: 0: nothing is mirrored. If it is, every worker is the only holder of something, and each keeps the
            mirror of the one before it, the first that of the last.
        some: ranks, several but not all, that die together.
        then: layouts that later lives of the controller are asked for.
    """

    parallel: dict[str, int]
    holders: tuple[tuple[int, ...], ...]
    cells: int
    precision: str = "fp32"
    copies: int | None = None
    mirror_every: int = 0
    some: tuple[tuple[int, ...], ...] = ()
    then: tuple[dict[str, int], ...] = ()

    @property
    def size(self) -> int:
        """Workers at first."""
        return size(self.parallel)

    @property
    def fewest(self) -> int:
        """Workers of any life."""
        return min(size(parallel) for parallel in (self.parallel, *self.then))

    @property
    def every(self) -> int:
        """Steps between two checkpoints: there are two mirrors between them, if any; see Cell.stops."""
        return 3 * self.mirror_every or EVERY

    @property
    def steps(self) -> int:
        return self.step_of(self.cells) + 2

    def step_of(self, cell: int) -> int:
        """Of the checkpoint that it is about: there is a complete one before it, and one that follows on it."""
        return 2 * self.every * (cell + 1)

    def outlived(self, dead: set[int]) -> bool:
        """Whether each of them kept its snapshots, and others' of it, where somebody is alive."""
        return self.mirror_every > 0 and not any((rank + 1) % self.size in dead for rank in dead)

    def specs(self, folder: Path) -> list[Prepared]:
        return [self._prepared(folder, parallel) for parallel in (self.parallel, *self.then)]

    def _prepared(self, folder: Path, parallel: dict[str, int]) -> Prepared:
        text = folder / "text.txt"
        text.write_bytes(bytes(range(32, 127)) * 100)
        train = {"steps": self.steps, "global_batch": 8, "micro_batch": 2, "learning_rate": 0.01, "warmup_steps": 2}
        decoder = {"d_model": 32, "layers": 2, "heads": 2, "kv_heads": 2, "seq_len": 16, "dropout": 0.1}
        values = {
            "run": {"name": "run", "storage_path": str(folder), "seed": 3},
            "model": {"name": "decoder", **decoder},
            "data": {"name": "text", "path": str(text)},
            "train": {**train, "precision": self.precision},
            "scaling": {"workers": [size(parallel)] * 2},
            "parallel": parallel,
            "redundancy": {"copies": self.copies, "mirror_every": self.mirror_every},
            "checkpoint": {"every_steps": self.every},
        }
        return prepare(load_config([], values=values))


def size(parallel: dict[str, int]) -> int:
    return parallel["data"] * parallel["pipeline"] * parallel["tensor"]


@dataclass(frozen=True)
class Cell:
    """Who is killed in a phase. `ranks` None: all of them."""

    phase: str
    target: str
    ranks: tuple[int, ...] | None
    controller: bool = False

    def stops(self, number: int, setting: Setting) -> tuple[Stop, ...]:
        """A load needs a stop before it, which everybody dies of.

        A mirror is struck two after a checkpoint: the one between them is whole, and newer than all checkpoints.
        """
        step = setting.step_of(number) + (2 * setting.mirror_every if self.phase in MIRROR_PHASES else 0)
        everyone = tuple(range(setting.fewest))
        ranks = everyone if self.ranks is None else self.ranks
        alone = self.controller and self.ranks == ()
        stop = Stop(
            self.phase, step, (0,) if alone else ranks, ranks_die=not alone, everyone=self.ranks is None,
            controller=self.controller,
        )  # fmt: skip
        return (Stop("save", step, everyone, everyone=True), stop) if self.phase == LOAD else (stop,)


def cells_of(setting: Setting, phase: str) -> list[Cell]:
    """One row of the table."""
    cells = [Cell(phase, f"rank {rank}", (rank,)) for rank in range(setting.size)]
    if len(setting.holders[-1]) not in (1, setting.size):
        cells.append(Cell(phase, "both holders", setting.holders[-1]))
    return [
        *cells,
        *(Cell(phase, f"ranks {' and '.join(map(str, ranks))}", ranks) for ranks in setting.some),
        Cell(phase, "all", None),
        Cell(phase, "the controller", (), controller=True),
        Cell(phase, "rank 0 and the controller", (0,), controller=True),
        Cell(phase, "all and the controller", None, controller=True),
    ]


# ---------------------------------------------------------------- playing


@dataclass(frozen=True)
class Truth:
    """What a run without faults commits: a line per step, and the model."""

    lines: list[dict[str, Any]]
    model: dict[str, Tensor]


def committed(run: RunDirectory) -> Truth:
    lines = [{key: line[key] for key in SAME} for line in run.metrics()]
    return Truth(lines, load_tensors(run.files.read("final/model.safetensors") or b""))


def play(folder: Path, setting: Setting, cells: Sequence[Cell]) -> tuple[Truth, list[Struck], RunDirectory]:
    """Runs all cells, one after another in one run, to its end."""
    assert len(cells) <= setting.cells
    folder.mkdir(exist_ok=True)
    (folder / "stops").mkdir()
    specs = setting.specs(folder)
    write_beginning(specs[0], {}, None)
    stops = tuple(stop for i, cell in enumerate(cells) for stop in cell.stops(i, setting))
    with nothing_left():
        mirrors = setting.size if setting.mirror_every else 0
        held = Stops(folder / "stops", stops, mirrors, setting.mirror_every)
        run = KillableRun([made.spec for made in specs], specs[0].maker, held)
        end = run.run()
    assert (end.status, end.error) == ("finished", "")
    return committed(specs[0].directory), run.struck, specs[0].directory


class Truths:
    """Runs without faults, each made once."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._made: list[tuple[Setting, Truth]] = []

    def __call__(self, setting: Setting) -> Truth:
        if not any(known == setting for known, _ in self._made):
            self._made.append((setting, play(self._folder / str(len(self._made)), setting, ())[0]))
        return next(found for known, found in self._made if known == setting)


def results(folder: Path, setting: Setting, cells: Sequence[Cell], truth: Truth) -> list[Result]:
    outcome, struck, run = play(folder, setting, cells)
    problem = difference_of(outcome, truth, setting.precision)
    returns = returns_of(run)
    lost = {event["worker_id"] for event in run.events() if event["event"] == "worker_lost"}
    if not problem and not lost <= {worker for one in struck for worker in one.died}:
        problem = f"lost {sorted(lost)}"
    counts = [*(one.restored for one in struck[1:]), len(returns)]
    problems = [
        problem or problem_of(one, setting, returns[one.restored : count])
        for one, count in zip(struck, counts, strict=True)
    ]
    found: list[Result] = []
    for cell in cells:
        number = 2 if cell.phase == LOAD else 1
        here, struck, (*earlier, own) = struck[:number], struck[number:], problems[:number]
        redone = sum(back.redone for back in returns[here[0].restored : counts[number - 1]])
        problems, counts = problems[number:], counts[number:]
        problem = next(filter(None, earlier), own)
        found.append(Result("kill", cell.phase, cell.target, problem, here[-1].heal_s, redone))
    return found


@dataclass(frozen=True)
class Return:
    """One time that the run went back: to which step, and how many visible steps were run again for it."""

    base: int
    redone: int
    to_mirrors: bool


def returns_of(run: RunDirectory) -> list[Return]:
    lines = run.follow("metrics").poll()
    restored = [event for event in run.events() if event["event"] == "restored"]
    found: list[Return] = []
    visible = 0
    for line in sorted([*lines, *restored], key=lambda line: line["time"]):
        if "base" in line:
            found.append(Return(line["base"], visible - line["base"], "back to the mirrors" in line["reason"]))
        visible = line["base"] if "base" in line else line["step"]
    assert sum(back.redone for back in found) == len(lines) - len(run.metrics()), "nothing else runs a step again"
    return found


def difference_of(outcome: Truth, truth: Truth, precision: str) -> str:
    """What was committed otherwise than without faults: in fp64, where the layout changed, by more than rounding."""
    if precision != "fp64":
        if outcome.lines != truth.lines:
            return "other metrics than without faults"
        same = all(torch.equal(outcome.model[name], tensor) for name, tensor in truth.model.items())
        return "" if same else "another model than without faults"
    losses = [(a["loss"], b["loss"]) for a, b in zip(outcome.lines, truth.lines, strict=True)]
    if not all(abs(a - b) <= TOLERANCE * abs(b) for a, b in losses):
        return "other losses than without faults"
    return "" if difference(outcome.model, truth.model) <= TOLERANCE else "another model than without faults"


def problem_of(struck: Struck, setting: Setting, returns: Sequence[Return]) -> str:
    """What is wrong with what was there when they were dead, or with what the run went back to.

    It says that it goes back if that takes back a step; so not in a load, nor to the step that was committed last.
    """
    stop, newest = struck.stop, struck.newest
    if struck.damage:
        return "; ".join(struck.damage)
    if not (newest == struck.at if stop.phase == VISIBLE else struck.before <= newest < struck.at):
        return f"the newest checkpoint is of step {newest}; {struck.before} was there, {struck.at} was being written"
    bases = [back.base for back in returns]
    dead = set(stop.ranks) if stop.ranks_die else set()
    lost = stop.everyone or stop.phase == LOAD or any(set(holders) <= dead for holders in setting.holders)
    if not lost:
        return f"went back to {bases}, though nothing was lost" if bases else ""
    if setting.outlived(dead) and not stop.everyone and stop.phase != LOAD:
        return problem_with_mirrors(stop, setting, newest, returns)
    # A controller that lives makes visible what is whole of the next checkpoint, as it does with the one that it was
    # held in.
    if stop.holds_controller and not stop.controller:
        least = struck.at
        return "" if min(bases, default=least) >= least else f"went back to {bases}, not to {least} or later"
    return "" if set(bases) <= {newest} else f"went back to {bases}; {newest} is the newest"


def problem_with_mirrors(stop: Stop, setting: Setting, newest: int, returns: Sequence[Return]) -> str:
    """What is wrong with what it went back to, though somebody alive had a whole mirror of each part.

    That was at most `mirror_every` older than the stop. Others may have trained on meanwhile, and mirrored more. Where
    a checkpoint was struck there may be a newer one than that mirror: a new life of the controller asks for one.
    """
    oldest = max(newest, stop.step - setting.mirror_every)
    if newest == oldest and stop.phase in MIRROR_PHASES:
        return f"the checkpoint of step {newest} is as new as the mirrors, so that these show nothing"
    if not returns and stop.phase in ("save", "mirror", "exchange"):
        return "did not go back, though nobody alive had the newest state, nor a mirror of it"
    wrong = [back.base for back in returns if back.base < oldest or (back.base > newest and not back.to_mirrors)]
    return f"went back to {wrong}, not to mirrors of step {oldest} or later" if wrong else ""
