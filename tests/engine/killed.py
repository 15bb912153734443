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
FIRST, SPACING = 8, 2 * EVERY
"""Steps of the first stop, and between two: each has a complete checkpoint before it, and one to be written."""
TOLERANCE = 1e-10
SAME = ("step", "loss", "grad_norm", "lr", "tokens", "samples")


@dataclass(frozen=True)
class Setting:
    """A layout, and how many steps its runs have: one number for all, so that one run without faults serves them all.

    Attributes:
        holders: each of them the ranks that are the only holders of some slices.
        mirror_every: 0: nothing is mirrored. If it is, every worker is the only holder of something.
        then: layouts that later lives of the controller are asked for.
    """

    parallel: dict[str, int]
    holders: tuple[tuple[int, ...], ...]
    cells: int
    precision: str = "fp32"
    copies: int | None = None
    mirror_every: int = 0
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
    def steps(self) -> int:
        return FIRST + SPACING * self.cells + 2

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
            "checkpoint": {"every_steps": EVERY},
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

    def stops(self, step: int, fewest: int) -> tuple[Stop, ...]:
        """A load needs a stop before it, which everybody dies of. Mirrors are killed between two checkpoints."""
        step += EVERY // 2 if self.phase in MIRROR_PHASES else 0
        ranks = tuple(range(fewest)) if self.ranks is None else self.ranks
        alone = self.controller and self.ranks == ()
        stop = Stop(
            self.phase, step, (0,) if alone else ranks, ranks_die=not alone, everyone=self.ranks is None,
            controller=self.controller,
        )  # fmt: skip
        return (Stop("save", step, tuple(range(fewest)), everyone=True), stop) if self.phase == LOAD else (stop,)


def cells_of(setting: Setting, phase: str) -> list[Cell]:
    """One row of the table."""
    cells = [Cell(phase, f"rank {rank}", (rank,)) for rank in range(setting.size)]
    if len(setting.holders[-1]) not in (1, setting.size):
        cells.append(Cell(phase, "both holders", setting.holders[-1]))
    return [
        *cells,
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
    numbered = enumerate(cells)
    stops = tuple(stop for i, cell in numbered for stop in cell.stops(FIRST + SPACING * i, setting.fewest))
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
    bases = [base for base, _ in returns]
    lost = {event["worker_id"] for event in run.events() if event["event"] == "worker_lost"}
    if not problem and not lost <= {worker for one in struck for worker in one.died}:
        problem = f"lost {sorted(lost)}"
    counts = [*(one.restored for one in struck[1:]), len(bases)]
    problems = [
        problem or problem_of(one, setting, bases[one.restored : count])
        for one, count in zip(struck, counts, strict=True)
    ]
    found: list[Result] = []
    for cell in cells:
        number = 2 if cell.phase == LOAD else 1
        here, struck, (*earlier, own) = struck[:number], struck[number:], problems[:number]
        redone = sum(steps for _, steps in returns[here[0].restored : counts[number - 1]])
        problems, counts = problems[number:], counts[number:]
        problem = next(filter(None, earlier), own)
        found.append(Result("kill", cell.phase, cell.target, problem, here[-1].heal_s, redone))
    return found


def returns_of(run: RunDirectory) -> list[tuple[int, int]]:
    """Of each time that the run went back: to which step, and how many visible steps were run again for it."""
    lines = run.follow("metrics").poll()
    restored = [event for event in run.events() if event["event"] == "restored"]
    found: list[tuple[int, int]] = []
    visible = 0
    for line in sorted([*lines, *restored], key=lambda line: line["time"]):
        if "base" in line:
            found.append((line["base"], visible - line["base"]))
        visible = line["base"] if "base" in line else line["step"]
    assert sum(steps for _, steps in found) == len(lines) - len(run.metrics()), "nothing else runs a step again"
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


def problem_of(struck: Struck, setting: Setting, bases: Sequence[int]) -> str:
    """What is wrong with what was there when they were dead, or with what the run went back to.

    It says that it goes back if that takes back a step; so not in a load, nor to the step that was committed last.
    """
    stop, newest = struck.stop, struck.newest
    if struck.damage:
        return "; ".join(struck.damage)
    if not (newest == struck.at if stop.phase == VISIBLE else struck.before <= newest < struck.at):
        return f"the newest checkpoint is of step {newest}; {struck.before} was there, {struck.at} was being written"
    dead = set(stop.ranks) if stop.ranks_die else set()
    lost = stop.everyone or stop.phase == LOAD or any(set(holders) <= dead for holders in setting.holders)
    if not lost:
        return f"went back to {list(bases)}, though nothing was lost" if bases else ""
    # Training goes on while others are held: to newer mirrors, and to the next checkpoint, of which a controller that
    # lives makes visible what is whole of it, as it does with the one that it was held in.
    lives = stop.holds_controller and not stop.controller
    mirrored = setting.mirror_every > 0 and stop.phase != LOAD
    base = struck.at if lives else newest
    if mirrored and not stop.everyone:
        base = max(newest, stop.step - setting.mirror_every)  # whole before the step of the stop
    if lives or mirrored:
        return "" if min(bases, default=base) >= base else f"went back to {list(bases)}, not to {base} or later"
    return "" if set(bases) <= {base} else f"went back to {list(bases)}; {base} is the newest"
