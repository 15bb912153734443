"""Bad input is one line that names file and key, exit status 2, and nothing is started or left."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from ray_runs import ROOT, merged

from evenkeel.config import load_config
from evenkeel.trainer import run

TEXT = bytes(range(32, 127)) * 20


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_bytes(TEXT)
    return path


def refusal(tmp_path: Path, capsys: pytest.CaptureFixture[str], changes: dict[str, Any], **data: Any) -> str:
    """What a run with these changes is refused with."""
    values = merged({"data": {"path": str(tmp_path / "text.txt"), **data}, **changes})
    values["run"] = {"name": "r", "storage_path": str(tmp_path / "runs"), **changes.get("run", {})}
    assert run(load_config([], values=values)) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert not (tmp_path / "runs" / "r").exists()
    assert said.err.startswith("evenkeel: ")
    assert said.err.count("\n") == 1
    return said.err.removeprefix("evenkeel: ").rstrip()


@pytest.mark.usefixtures("text")
@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"parallel": {"tensor": 4, "data": 1}, "scaling": {"workers": [4, 4]}}, "parallel.tensor: 4 does not divide"),
        ({"parallel": {"pipeline": 6, "data": 1}, "scaling": {"workers": [6, 6]}}, "parallel.pipeline: 6 stages, but"),
        ({"parallel": {"data": 5}, "scaling": {"workers": [5, 5]}}, "parallel.data: 5 pipelines, but a step has"),
        ({"model": {"heads": 3}}, "Python: model.heads: 3 do not divide"),
        ({"model": {"name": "nonsense"}}, "Python: model.name: 'nonsense' is not known; expected one of decoder"),
        ({"model": {"name": "no_such_module:build"}}, "Python: model.name: cannot import 'no_such_module'"),
        ({"train": {"global_batch": 2000}}, "train.global_batch is 2000"),
        ({"scaling": {"resources_per_worker": {"slot": 1.0}}}, "slot"),
    ],
)
def test_what_does_not_fit_together(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, changes: Any, says: str
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "local")
    assert says in refusal(tmp_path, capsys, changes)


def test_text_that_is_missing_or_empty(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "Python: data.path: " in refusal(tmp_path, capsys, {})
    (tmp_path / "text.txt").write_bytes(b"")
    assert "Python: data.path: " in refusal(tmp_path, capsys, {})


@pytest.mark.usefixtures("text")
def test_storage_that_cannot_be_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("not a folder")
    said = refusal(tmp_path, capsys, {"run": {"storage_path": str(tmp_path / "file")}})
    assert str(tmp_path / "file") in said


def test_a_model_that_raises_is_told_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, text: Path
) -> None:
    (tmp_path / "broken_model.py").write_text("def build(config):\n    raise KeyError('width\\nsecond line')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    said = refusal(tmp_path, capsys, {"model": {"name": "broken_model:build"}})
    assert "Python: model.name: 'broken_model:build' raised KeyError" in said


def test_the_command_itself(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "jobs" / "train.py"), "--config", str(ROOT / "conf" / "local.yaml")]
    wrong = subprocess.run([*command, "run.name=a/b"], cwd=tmp_path, capture_output=True, text=True)
    assert (wrong.returncode, wrong.stdout) == (2, "")
    assert wrong.stderr.startswith("evenkeel: command line: run.name: 'a/b' must be a plain name")
    shown = subprocess.run([*command, "run.name=x", "--print-config"], cwd=tmp_path, capture_output=True, text=True)
    assert (shown.returncode, shown.stderr) == (0, "")
    assert "name: x" in shown.stdout
    dry = subprocess.run([*command, "run.name=x", "--dry-run"], cwd=tmp_path, capture_output=True, text=True)
    assert (dry.returncode, dry.stderr) == (0, "")
    assert "2 pipelines of 2 stages" in dry.stdout
    assert list(tmp_path.iterdir()) == []
