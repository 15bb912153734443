"""With any one rule of the protocol taken away, the swarm must fail within 200 seeds; else it proves nothing."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from compileall import compile_dir
from pathlib import Path
from py_compile import PycInvalidationMode

import pytest
from planted import BUGS, Bug

SEEDS = 200
PACKAGE = Path(__file__).parents[2] / "platform" / "evenkeel"
FOLDERS = ("core", "plan", "control", "sim")
SCRIPTS = Path(__file__).parents[1] / "scripts"
CAUGHT_BY = Path(__file__).parent / "caught_by.txt"
FOUND = re.compile(r"^seed (\d+): (wrong|stuck|crash): (.*)$", re.MULTILINE)


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the pure part of the package. Bugs are planted in copies of it, never in the source."""
    root = tmp_path_factory.mktemp("pristine")
    for folder in FOLDERS:
        ignore = shutil.ignore_patterns("__pycache__")
        shutil.copytree(PACKAGE / folder, root / "evenkeel" / folder, ignore=ignore)
    shutil.copy(PACKAGE / "__init__.py", root / "evenkeel")
    # Once for all copies. By hash: what a bug is planted in must never run as it was compiled here.
    assert compile_dir(root, quiet=1, invalidation_mode=PycInvalidationMode.CHECKED_HASH)
    return root


def plant(bug: Bug, root: Path) -> None:
    for name, text, replacement in bug.edits:
        path = root / "evenkeel" / name
        source = path.read_text()
        assert source.count(text) == 1, f"{bug.name}: {source.count(text)} times in {name}: {text!r}"
        path.write_text(source.replace(text, replacement))


def environment(root: Path) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(root), "PYTHONDONTWRITEBYTECODE": "1"}


def swarm(root: Path, seeds: str) -> subprocess.CompletedProcess[str]:
    """Runs the seeds on the copy, up to the first failure. The copy is all that is on the path: no torch, no Ray."""
    command = [sys.executable, "-m", "evenkeel.sim.swarm", "--seeds", seeds, "--jobs", "1", "--first"]
    return subprocess.run(command, env=environment(root), capture_output=True, text=True)


def caught_by() -> dict[str, int]:
    """The seed that caught each bug last."""
    lines = (line.split() for line in CAUGHT_BY.read_text().splitlines() if not line.startswith("#"))
    return {name: int(seed) for name, seed in lines}


def remember(seeds: Mapping[str, int]) -> None:
    head = [line for line in CAUGHT_BY.read_text().splitlines() if line.startswith("#")]
    by_swarm = (f"{bug.name} {seeds.get(bug.name, 0)}" for bug in BUGS if not bug.script)
    CAUGHT_BY.write_text("\n".join([*head, *by_swarm, ""]))


def test_the_copy_without_a_bug_passes_the_same_seeds(pristine: Path) -> None:
    result = swarm(pristine, f"0:{SEEDS}")
    assert result.returncode == 0, result.stdout + result.stderr
    assert f"{SEEDS} ok" in result.stdout


def scenario(root: Path, number: int) -> subprocess.CompletedProcess[str]:
    """Plays a text scenario on the copy: the status is 1 if the controller says something else than it must."""
    [script] = SCRIPTS.glob(f"{number}_*.txt")
    command = [sys.executable, str(SCRIPTS / "runner.py"), str(script)]
    return subprocess.run(command, env=environment(root), capture_output=True, text=True)


def test_the_copy_without_a_bug_plays_the_same_scenarios(pristine: Path) -> None:
    for number in sorted({bug.script for bug in BUGS if bug.script}):
        result = scenario(pristine, number)
        assert result.returncode == 0, f"{number}: {result.stderr}"


@pytest.mark.parametrize("bug", [bug for bug in BUGS if bug.script], ids=lambda bug: bug.name)
def test_shown_by_a_scenario(bug: Bug, pristine: Path, tmp_path: Path) -> None:
    shutil.copytree(pristine, tmp_path, dirs_exist_ok=True)
    plant(bug, tmp_path)
    result = scenario(tmp_path, bug.script)
    assert result.returncode == 1, f"scenario {bug.script} does not show it"
    assert not result.stderr, f"it does not run at all: {result.stderr}"


@pytest.mark.parametrize("bug", [bug for bug in BUGS if not bug.script], ids=lambda bug: bug.name)
def test_caught(bug: Bug, pristine: Path, tmp_path: Path, record_property: Callable[[str, object], None]) -> None:
    shutil.copytree(pristine, tmp_path, dirs_exist_ok=True)
    plant(bug, tmp_path)
    known = caught_by()
    first = known.get(bug.name, 0)
    assert first in range(SEEDS)
    result = swarm(tmp_path, str(first))
    if not FOUND.search(result.stdout):
        result = swarm(tmp_path, f"0:{SEEDS}")
    found = FOUND.search(result.stdout)
    assert found, f"not found in {SEEDS} seeds: {result.stdout}{result.stderr}"
    if os.environ.get("EVENKEEL_REWRITE"):
        remember({**known, bug.name: int(found.group(1))})
    record_property("found_by", found.group(0))
    print(f"{bug.name} (rule {bug.rule or 'none'}) is found by {found.group(0)}")
