"""Workers, several, all of them and the controller are killed at every phase of a checkpoint, a load and a mirror.

A telling part of it, and (soak) all of it; see killed.py.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from killable import HALF, MANIFEST, VISIBLE
from killed import EVERY, Cell, Setting, Truths, cells_of, results
from matrix import Result

from evenkeel.engine.faults import LOAD, MIRROR_PHASES, SAVE_PHASES

WORKER_PHASES = ("commit", "save", "write", HALF, "written")
PHASES = (*WORKER_PHASES, MANIFEST, VISIBLE, LOAD)
assert {"save", "write", "written"} == set(SAVE_PHASES)


TWO = {"data": 2, "pipeline": 1, "tensor": 1}
PAIR = Setting(TWO, ((0, 1),), cells=12)
QUAD = Setting({"data": 2, "pipeline": 2, "tensor": 1}, ((0, 2), (1, 3)), cells=10)
BF16 = Setting(TWO, ((0, 1),), cells=6, precision="bf16")
ONE_COPY = Setting(TWO, ((0,), (1,)), cells=6, copies=1)
OTHER = Setting(
    {"data": 2, "pipeline": 1, "tensor": 2}, ((0, 2), (1, 3)), cells=6, precision="fp64",
    then=({"data": 1, "pipeline": 2, "tensor": 1}, {"data": 3, "pipeline": 1, "tensor": 1}),
)  # fmt: skip
MIRRORED = {
    "stages": Setting({"data": 1, "pipeline": 2, "tensor": 1}, ((0,), (1,)), cells=6, mirror_every=2),
    "one copy": Setting(TWO, ((0,), (1,)), cells=6, copies=1, mirror_every=2),
    "four stages": Setting(
        {"data": 1, "pipeline": 4, "tensor": 1}, ((0,), (1,), (2,), (3,)), cells=10, mirror_every=2,
        some=((0, 2), (1, 2)),
    ),
}
TABLES = {"stages": "mirrors", "one copy": "mirrors, one copy", "four stages": "mirrors, four stages"}
SETTINGS = {"pair": PAIR, "quad": QUAD}


Check = Callable[[str, list[Result]], None]


@pytest.fixture(scope="module")
def truths(tmp_path_factory: pytest.TempPathFactory) -> Truths:
    return Truths(tmp_path_factory.mktemp("undisturbed"))


def test_a_part_of_it(tmp_path: Path, truths: Truths, check: Check) -> None:
    everyone = {"ranks": None, "controller": True}
    cells = [
        Cell("save", "rank 0", (0,)),
        Cell("write", "all", None),
        Cell(HALF, "all and the controller", **everyone),
        Cell("written", "rank 1", (1,)),
        Cell("written", "all and the controller", **everyone),
        Cell(MANIFEST, "all and the controller", **everyone),
        Cell(MANIFEST, "the controller", (), controller=True),
        Cell(VISIBLE, "all", None),
        Cell(VISIBLE, "rank 0 and the controller", (0,), controller=True),
        Cell(LOAD, "rank 1", (1,)),
        Cell(LOAD, "all and the controller", **everyone),
    ]
    found = results(tmp_path / "run", PAIR, cells, truths(PAIR))
    check("saves", found)
    redone = {(result.phase, result.target): result.redone for result in found}
    for held in (("save", "rank 0"), ("written", "rank 1"), (MANIFEST, "the controller")):
        assert redone[held] == 0, "somebody alive had all of it"
    for lost in (("write", "all"), (HALF, "all and the controller"), (LOAD, "rank 1")):
        assert redone[lost] >= EVERY - 2, "the last two steps may not have been visible"


def test_a_part_of_it_in_bf16(tmp_path: Path, truths: Truths, check: Check) -> None:
    """What the modules compute with is not in a checkpoint, but made of what is."""
    setting = replace(BF16, cells=2)
    cells = [Cell(HALF, "all", None), Cell(LOAD, "rank 1", (1,))]
    check("saves, bf16", results(tmp_path / "run", setting, cells, truths(setting)))


@pytest.mark.soak
@pytest.mark.timeout(900)
@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("name", SETTINGS)
def test_row(name: str, phase: str, tmp_path: Path, truths: Truths, check: Check) -> None:
    setting = SETTINGS[name]
    check("saves" if name == "pair" else "saves, stages", row(tmp_path, setting, phase, truths))


def row(folder: Path, setting: Setting, phase: str, truths: Truths) -> list[Result]:
    return results(folder / "run", setting, cells_of(setting, phase), truths(setting))


@pytest.mark.soak
@pytest.mark.timeout(900)
@pytest.mark.parametrize("phase", [HALF, LOAD])
def test_row_in_bf16(phase: str, tmp_path: Path, truths: Truths, check: Check) -> None:
    check("saves, bf16", row(tmp_path, BF16, phase, truths))


@pytest.mark.soak
@pytest.mark.timeout(900)
@pytest.mark.parametrize("phase", ["save", HALF, "written", MANIFEST, LOAD])
def test_row_with_one_copy(phase: str, tmp_path: Path, truths: Truths, check: Check) -> None:
    """Whoever dies alone holds a part of the optimizer's state."""
    check("saves, one copy", row(tmp_path, ONE_COPY, phase, truths))


@pytest.mark.soak
@pytest.mark.timeout(900)
@pytest.mark.parametrize("phase", PHASES)
def test_all_die_and_another_layout_goes_on(phase: str, tmp_path: Path, truths: Truths, check: Check) -> None:
    """Each life of the controller is asked for the next of three layouts. In fp64."""
    cells = [Cell(phase, f"all and the controller, {n}", None, controller=True) for n in range(4)]
    check("saves, other layouts", results(tmp_path / "run", OTHER, cells, truths(OTHER)))


def test_mirrors_in_part(tmp_path: Path, truths: Truths, check: Check) -> None:
    """Of two that die at once others keep the mirrors, or one of them kept those of the other."""
    cells = [
        Cell("mirror", "rank 1", (1,)),
        Cell("exchange", "ranks 0 and 2", (0, 2)),
        Cell("exchange", "rank 0 and the controller", (0,), controller=True),
        Cell("mirrored", "ranks 1 and 2", (1, 2)),
    ]
    setting = replace(MIRRORED["four stages"], cells=len(cells))
    found = results(tmp_path / "run", setting, cells, truths(setting))
    check("mirrors, four stages", found)
    *outlived, lost = (result.redone for result in found)
    assert max(outlived) <= setting.mirror_every + 1 < lost


@pytest.mark.soak
@pytest.mark.timeout(900)
@pytest.mark.parametrize("phase", [*MIRROR_PHASES, "save", HALF, LOAD])
@pytest.mark.parametrize("name", MIRRORED)
def test_mirrored_row(name: str, phase: str, tmp_path: Path, truths: Truths, check: Check) -> None:
    """Everybody is the only holder of something, which is mirrored every two steps."""
    check(TABLES[name], row(tmp_path, MIRRORED[name], phase, truths))
