"""The fault matrix: which faults hit whom, and what a cell is.

A cell is a kind of fault, a phase and the ranks that it hits. The cells of one run follow each other SPACING steps
apart; before each one the run is held until enough spares stand by (see matrix_runs.py).
"""

from dataclasses import dataclass

from evenkeel.engine.faults import RECOVERY

FIRST = 4
"""The step of the first cell; before it, a step's usual time becomes known."""
SPACING = 4


@dataclass(frozen=True)
class Setting:
    """A layout, and which ranks of it are hit.

    Attributes:
        targets: by name, the ranks that are hit together; any of them leaves a holder of every slice.
        triggers: by the name of a target, the rank whose death begins the recovery in which the target is hit;
            targets without one cannot be hit in a recovery and leave a holder of every slice.
        both: ranks that are the only holders of some slices.
    """

    wish: dict[str, int]
    workers: int
    targets: dict[str, tuple[int, ...]]
    triggers: dict[str, int]
    both: tuple[int, int]
    tied: bool = False

    @property
    def steps(self) -> int:
        """One number for all runs of the setting, so that one run without faults serves them all."""
        return FIRST + SPACING * (len(self.targets) + 1)


STAGES = Setting(
    {"data": 2, "pipeline": 3, "tensor": 1},
    6,
    {
        "first, pipeline 0": (0,),
        "middle, pipeline 0": (1,),
        "last, pipeline 0": (2,),
        "first, pipeline 1": (3,),
        "middle, pipeline 1": (4,),
        "last, pipeline 1": (5,),
        "two at once": (1, 3),
    },
    {
        "first, pipeline 0": 4,
        "middle, pipeline 0": 5,
        "last, pipeline 0": 3,
        "first, pipeline 1": 1,
        "middle, pipeline 1": 2,
        "last, pipeline 1": 0,
        "two at once": 2,
    },
    both=(2, 5),
    tied=True,
)
TENSOR = Setting(
    {"data": 2, "pipeline": 1, "tensor": 2},
    4,
    {
        "TP 0, pipeline 0": (0,),
        "TP 1, pipeline 0": (1,),
        "TP 0, pipeline 1": (2,),
        "TP 1, pipeline 1": (3,),
        "two at once": (0, 3),
    },
    {"TP 0, pipeline 0": 1, "TP 1, pipeline 0": 0, "TP 0, pipeline 1": 3, "TP 1, pipeline 1": 2},
    both=(1, 3),
)
PAIRS = Setting(
    {"data": 2, "pipeline": 2, "tensor": 1},
    4,
    {"first, pipeline 0": (0,), "last, pipeline 0": (1,), "first, pipeline 1": (2,), "last, pipeline 1": (3,)},
    {"first, pipeline 0": 3, "last, pipeline 0": 2, "first, pipeline 1": 1, "last, pipeline 1": 0},
    both=(1, 3),
    tied=True,
)
UNEQUAL = Setting(
    {"data": 2, "pipeline": 2, "tensor": 1},
    3,
    {"first of two": (0,), "last of two": (1,), "the only stage": (2,), "two at once": (0, 1)},
    {"first of two": 1, "last of two": 0},
    both=(1, 2),
    tied=True,
)
ONE_PIPELINE = Setting(
    {"data": 1, "pipeline": 2, "tensor": 2},
    4,
    {f"stage {rank // 2}, TP {rank % 2}": (rank,) for rank in range(4)},
    {},
    both=(0, 1),
)
"""Without a second pipeline nobody may die; but everybody may raise, before its commit."""


@dataclass(frozen=True)
class Cell:
    """One fault, or several at once.

    Attributes:
        target: its name in the table.
        victims: ranks; in a recovery those of the world that is being formed.
        trigger: the rank that is killed so that there is a recovery; None for a fault in a step.
    """

    kind: str
    phase: str
    target: str
    victims: tuple[int, ...]
    trigger: int | None = None

    @property
    def deaths(self) -> tuple[int, ...]:
        """Ranks of the world before that have to be replaced. Who raises in its commit is dead (rule 8)."""
        dead = self.victims if self.kind != "exception" or self.phase == "commit" else ()
        return dead if self.trigger is None else (*dead, self.trigger)


@dataclass(frozen=True)
class Result:
    """What became of a cell: `problem` is "" if it held; `heal_s` is from the fault's first sign to the next commit."""

    kind: str
    phase: str
    target: str
    problem: str = ""
    heal_s: float = 0.0
    redone: int = 0

    @property
    def text(self) -> str:
        return f"{self.kind} in {self.phase} on {self.target}: {self.problem or 'ok'}"


def cells_of(setting: Setting, kind: str, phase: str) -> list[Cell]:
    """One row of the table."""
    if phase == RECOVERY:
        named = setting.triggers.items()
        cells = [Cell(kind, phase, name, setting.targets[name], trigger) for name, trigger in named]
    else:
        cells = [Cell(kind, phase, name, ranks) for name, ranks in setting.targets.items()]
    if kind == "exception" and phase not in ("commit", RECOVERY):
        cells.append(Cell(kind, phase, "both holders", setting.both))
    return cells
