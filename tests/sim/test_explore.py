"""Every interleaving of small runs: with the protocol as it is nothing goes wrong, without a rule something does."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from planted import BUGS
from test_planted_bugs import environment, plant, pristine

from evenkeel.sim.explore import explore
from evenkeel.sim.situation import Bounds

__all__ = ["pristine"]

BY_NAME = {bug.name: bug for bug in BUGS}


@pytest.mark.parametrize(
    "bounds",
    [
        Bounds(crashes=1, errors=1),
        Bounds(crashes=0, suspicions=1),
        Bounds(members=1, crashes=0, controller_crashes=1),
    ],
    ids=str,
)
def test_nothing_goes_wrong(bounds: Bounds) -> None:
    explored = explore(bounds)
    assert explored.wrong == "", "\n".join([*explored.story, f"=> {explored.wrong}"])
    assert explored.whole
    assert explored.ends["finished"] > 0


@pytest.mark.soak
@pytest.mark.parametrize(
    "bounds",
    [
        Bounds(spares=1, crashes=1),
        Bounds(crashes=0, controller_crashes=1),
        Bounds(crashes=1, suspicions=1, spares=1),
        Bounds(crashes=1, controller_crashes=1),
    ],
    ids=str,
)
def test_nothing_goes_wrong_in_larger_runs(bounds: Bounds) -> None:
    explored = explore(bounds, max_states=200_000)
    assert explored.wrong == "", "\n".join([*explored.story, f"=> {explored.wrong}"])


@pytest.mark.parametrize(
    "name",
    [
        "answer-before-parked",
        "abort-flag-not-checked",
        "report-is-no-witness",
        "reports-after-the-decision",
        "abort-does-not-reach-ahead",
    ],
)
def test_without_a_rule_there_is_a_shortest_way_to_go_wrong(name: str, pristine: Path, tmp_path: Path) -> None:
    shutil.copytree(pristine, tmp_path, dirs_exist_ok=True)
    plant(BY_NAME[name], tmp_path)
    command = [sys.executable, "-m", "evenkeel.sim.explore", "--max-states", "30000"]
    result = subprocess.run(command, env=environment(tmp_path), capture_output=True, text=True)
    assert result.returncode == 5, result.stdout + result.stderr
    assert "=> " in result.stdout
    print(result.stdout)
