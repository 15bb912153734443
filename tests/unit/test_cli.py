"""The command line, as a user's shell sees it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from evenkeel import __version__
from evenkeel.linux import UnsupportedSystemError, require_linux
from evenkeel.store.run_directory import RunDirectory, RunRecord

ROOT = Path(__file__).parents[2]


def evenkeel(*arguments: str) -> "subprocess.CompletedProcess[str]":
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "platform")}
    command = [sys.executable, "-m", "evenkeel.cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment)


@pytest.fixture
def run(tmp_path: Path) -> str:
    directory = RunDirectory.of(str(tmp_path), "first")
    directory.write_run(RunRecord("first", "finished", 1.0, 9.0, ended=9.0))
    for step in (1, 2):
        line = {"step": step, "loss": 3.0 / step, "time": 2.0 + step, "generation": 1, "world_size": 4}
        directory.append_metrics(line)
    directory.append_event({"time": 3.0, "event": "incident", "generation": 2, "step": 2, "cause": "worker lost"})
    directory.append_event({"time": 3.0, "event": "world_formed", "generation": 2, "step": 2})
    directory.close()
    return directory.url


def test_version() -> None:
    done = evenkeel("--version")
    assert (done.returncode, done.stdout) == (0, f"evenkeel {__version__}\n")


def test_status_in_words(run: str) -> None:
    done = evenkeel("status", run)
    assert done.returncode == 0
    assert done.stdout.startswith("first finished\n  steps       2 (last 2) in 1.0 s\n  loss        3.0000 at first")
    assert f"directory   {run}" in done.stdout


def test_status_as_json(run: str) -> None:
    done = evenkeel("status", run, "--json")
    status = json.loads(done.stdout)
    assert (status["status"], status["last"]["step"], status["ended"], status["directory"]) == ("finished", 2, 9.0, run)
    assert [e["cause"] for e in status["incidents"]] == ["worker lost"]


def test_status_of_nothing_is_one_line_and_2(tmp_path: Path) -> None:
    done = evenkeel("status", str(tmp_path / "none"))
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"evenkeel: {tmp_path}/none: no run here (there is no run.json)\n"


def test_status_of_a_newer_format_is_one_line_and_2(run: str) -> None:
    (Path(run) / "run.json").write_text('{"format": 99}')
    done = evenkeel("status", run)
    assert done.returncode == 2
    assert "has format 99" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_bad_arguments_are_2() -> None:
    assert evenkeel("status").returncode == 2
    assert evenkeel("nonsense").returncode == 2


@pytest.mark.parametrize("system", ["darwin", "win32"])
def test_other_systems_are_refused_by_name(system: str) -> None:
    require_linux("linux")
    with pytest.raises(UnsupportedSystemError, match=f"evenkeel runs on Linux only; this is {system}"):
        require_linux(system)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ([], "expected the directory of one run, or --config FILE and any key=value"),
        (["run.name=first"], "expected the directory of one run, or --config FILE"),
        (["a", "b"], "expected the directory of one run"),
        (["--config", "none.yaml"], "none.yaml: cannot be read"),
        (["{run}"], "has neither profile.json nor config.yaml; measure with --config FILE"),
    ],
)
def test_a_profile_of_nothing_is_one_line_and_2(run: str, words: list[str], says: str) -> None:
    done = evenkeel("profile", *(word.format(run=run) for word in words))
    assert (done.returncode, done.stdout) == (2, "")
    assert says in done.stderr and len(done.stderr.splitlines()) == 1


def test_a_profile_is_not_measured_with_secrets_that_are_not_written_down(run: str) -> None:
    (Path(run) / "config.yaml").write_text("run: {name: first}\ndata: {secret_key: '***'}\n")
    done = evenkeel("profile", run)
    assert done.returncode == 2 and "data.secret_key: is a secret, which a run does not write down" in done.stderr


def test_a_damaged_profile_is_named(run: str) -> None:
    (Path(run) / "profile.json").write_text('{"format": 1}')
    done = evenkeel("profile", run)
    assert done.returncode == 2 and "profile.json: damaged: ProfileRecord: field 'key'" in done.stderr


@pytest.mark.parametrize(
    "words",
    [
        ("simulate", "8x1", "--seeds", "0"), ("simulate", "8x1", "--seeds", "abc"), ("simulate", "8x1", "8x1"),
        ("plan",), ("plan", "8xH100", "--compare", "best"), ("status",), ("nonsense",),
    ],
)  # fmt: skip
def test_options_and_arguments_that_are_wrong_are_one_line_and_2(words: tuple[str, ...]) -> None:
    done = evenkeel(*words)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("evenkeel: ") and done.stderr.count("\n") == 1


def test_no_command_at_all_prints_what_there_is() -> None:
    done = evenkeel()
    assert done.returncode == 2
    assert "simulate" in done.stdout + done.stderr
