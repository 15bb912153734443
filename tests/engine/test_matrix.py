"""The fault matrix: a telling part of it, and (soak) all of it. `docs/faults.md` is made from its results."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from matrix import PAIRS, STAGES, TENSOR, Cell, Result, Setting, cells_of
from matrix_runs import Truth, play, play_lost, play_spare, play_without_spares, undisturbed

from evenkeel.engine.faults import RECOVERY, STEP_PHASES

KINDS = ("kill", "segv", "exception", "stop")
PHASES = (*STEP_PHASES, RECOVERY)
SETTINGS = {"stages": STAGES, "tensor": TENSOR}
Truths = Callable[..., Truth]


@pytest.fixture(scope="module")
def truths(tmp_path_factory: pytest.TempPathFactory) -> Truths:
    """Runs without faults, each made once."""
    made: dict[str, Truth] = {}

    def truth(name: str, **options: Any) -> Truth:
        key = f"{name} {options}"
        if key not in made:
            made[key] = undisturbed(tmp_path_factory.mktemp("undisturbed"), SETTINGS[name], **options)
        return made[key]

    return truth


Check = Callable[[str, list[Result]], None]


def cell(setting: Setting, kind: str, phase: str, target: str) -> Cell:
    return next(c for c in cells_of(setting, kind, phase) if c.target == target)


def test_stages_of_two_pipelines(tmp_path: Path, truths: Truths, check: Check) -> None:
    wanted = [
        ("kill", "forward", "first, pipeline 0"),
        ("segv", "backward", "middle, pipeline 1"),
        ("exception", "reduce", "last, pipeline 0"),
        ("exception", "after_vote", "both holders"),
        ("stop", "before_vote", "first, pipeline 1"),
        ("kill", RECOVERY, "middle, pipeline 0"),
        ("kill", "commit", "two at once"),
    ]
    check("stages", play(tmp_path, STAGES, [cell(STAGES, *w) for w in wanted], truths("stages")))


def test_tensor_parallel_pairs(tmp_path: Path, truths: Truths, check: Check) -> None:
    """In bf16, so that this too is seen to heal to the last bit."""
    wanted = [
        ("kill", "backward", "TP 1, pipeline 0"),
        ("exception", "commit", "TP 0, pipeline 1"),
        ("exception", RECOVERY, "TP 0, pipeline 0"),
        ("segv", "after_vote", "TP 1, pipeline 1"),
        ("kill", "reduce", "two at once"),
    ]
    cells = [cell(TENSOR, *w) for w in wanted]
    check("bf16", play(tmp_path, TENSOR, cells, truths("tensor", precision="bf16"), precision="bf16"))


@pytest.mark.parametrize("phase", ["after_vote", RECOVERY])
def test_the_only_two_holders(phase: str, tmp_path: Path, check: Check) -> None:
    check("stages", [play_lost(tmp_path, STAGES, "kill", phase)])


# ---------------------------------------------------------------- all of it


@pytest.mark.soak
@pytest.mark.timeout(900)
@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", SETTINGS)
def test_row(name: str, kind: str, phase: str, tmp_path: Path, truths: Truths, check: Check) -> None:
    setting = SETTINGS[name]
    check(name, play(tmp_path, setting, cells_of(setting, kind, phase), truths(name)))


@pytest.mark.soak
@pytest.mark.timeout(900)
@pytest.mark.parametrize("phase", PHASES)
def test_row_in_bf16(phase: str, tmp_path: Path, truths: Truths, check: Check) -> None:
    cells = cells_of(TENSOR, "kill", phase)
    check("bf16", play(tmp_path, TENSOR, cells, truths("tensor", precision="bf16"), precision="bf16"))


@pytest.mark.soak
@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", SETTINGS)
def test_both_holders(name: str, kind: str, phase: str, tmp_path: Path, check: Check) -> None:
    """Whoever raises outside of its commit lives on with its slices: that is a cell of the row."""
    if kind == "exception" and phase != "commit":
        pytest.skip("nobody dies of it")
    check(name, [play_lost(tmp_path, SETTINGS[name], kind, phase)])


@pytest.mark.soak
@pytest.mark.timeout(900)
@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("kind", ["kill", "segv", "stop"])
def test_row_without_spares(kind: str, phase: str, tmp_path: Path, check: Check) -> None:
    cells = cells_of(PAIRS, kind, phase)
    if phase == RECOVERY:
        cells[3] = replace(cells[3], victims=(2,))  # of the three that rank 0 leaves it is the last
    check("shrinking", play_without_spares(tmp_path, PAIRS, cells))


@pytest.mark.soak
@pytest.mark.parametrize("kind", ["kill", "segv", "stop"])
def test_spares(kind: str, tmp_path: Path, check: Check) -> None:
    check("spare", play_spare(tmp_path, kind))
