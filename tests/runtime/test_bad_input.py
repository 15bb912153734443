"""Bad input is one line that names file and key, exit status 2, and nothing is started or left."""

import subprocess
import sys
import traceback
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from fsspec.config import conf
from ray_runs import ROOT, merged
from torch.nn import BatchNorm1d

from evenkeel.config import ConfigError, load_config
from evenkeel.core.ids import WorkerId
from evenkeel.engine.model import LayerSpec, Model
from evenkeel.runtime.job import JobMaker
from evenkeel.runtime.look import check_same, what_it_keeps
from evenkeel.runtime.prepare import Prepared, environment, prepare
from evenkeel.runtime.run import write_beginning
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
        ({"scaling": {"use_gpu": True}}, "Python: scaling.use_gpu: is true, but PyTorch finds no GPU on this machine"),
        ({"model": {"vocab_size": 100}}, "Python: model.vocab_size: is 100, but the tokens of data.name 'text' go"),
        (
            {
                "parallel": {"pipeline": None},
                "scaling": {"workers": [2, 9]},
                "faults": [{"step": 1, "phase": "forward", "target": "stage:5"}],
            },
            "Python: faults.0.target: is 'stage:5', but the model has only",
        ),
    ],
)
def test_what_does_not_fit_together(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, changes: Any, says: str
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "local")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
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


def broken_model(config: Mapping[str, Any]) -> Model:
    raise KeyError("width")


def test_a_model_given_in_python_is_blamed_by_its_own_name(tmp_path: Path, text: Path) -> None:
    config = merged({"run": {"name": "r", "storage_path": str(tmp_path / "runs")}, "data": {"path": str(text)}})
    unusable = Model((LayerSpec("norm", partial(BatchNorm1d, 4)),))
    for model, says in (
        (broken_model, "Python: model: broken_model raised KeyError: 'width'"),
        (unusable, "Python: model: the given Model raised ValueError: norm."),
        (partial(dict, a=1), "Python: model: the function returned dict, not a Model"),
    ):
        with pytest.raises(ConfigError) as caught:
            prepare(load_config([], values=config), model)
        assert str(caught.value).startswith(says)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("where", ["get", "fingerprint"])
def test_data_that_raises_is_blamed_on_the_data(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    (tmp_path / "broken_data.py").write_text(f"""
from evenkeel.data.dataset import Data

class Broken:
    def __len__(self):
        return 100

    def fingerprint(self):
        {"raise OSError('disk gone')" if where == "fingerprint" else "return 'x'"}

    def get(self, indices):
        raise OSError("disk gone")

def load(config):
    return Data(Broken())
""")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "broken_data", raising=False)
    said = refusal(tmp_path, capsys, {"data": {"name": "broken_data:load"}})
    assert said == "Python: data.name: 'broken_data:load' raised OSError: disk gone"


CLOSED = '''
"""Data that says all that it was given where it fails."""

import torch

from evenkeel.data.dataset import Data


class Closed:
    def __init__(self, config):
        self._config = config
        self._fail("load")

    def _fail(self, where):
        if self._config["fails"] == where:
            raise PermissionError(f"not with {self._config['storage_options']}")

    def __len__(self):
        self._fail("len")
        return 100

    def fingerprint(self):
        self._fail("fingerprint")
        return ""

    def get(self, indices):
        self._fail("get")
        samples = torch.zeros((len(indices), 16), dtype=torch.int64)
        return samples, samples


def load(config):
    return Data(Closed(config))
'''
HIDDEN = "PermissionError: not with {'secret': '***', 'endpoint_url': 'http://***@there'}"


@pytest.fixture
def closed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A section `data` that holds secrets."""
    (tmp_path / "closed_data.py").write_text(CLOSED)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "closed_data", raising=False)
    options = {"secret": "hush/hush", "endpoint_url": "http://me:hush/hush@there"}
    return {"name": "closed_data:load", "storage_options": options}


def maker(tmp_path: Path, data: dict[str, Any]) -> JobMaker:
    return JobMaker(load_config([], values=merged({"run": {"name": "r"}, "data": data})), str(tmp_path), "")


@pytest.mark.parametrize("fails", ["load", "fingerprint", "get", "len"])
def test_what_the_users_code_raises_is_told_without_secrets(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], closed: dict[str, Any], fails: str
) -> None:
    """In the process that the user started, and in a worker's, which writes a traceback to its log."""
    said = refusal(tmp_path, capsys, {"data": {**closed, "fails": fails}})
    assert said == f"Python: data.name: 'closed_data:load' raised RuntimeError: {HIDDEN}"
    if fails == "len":
        return  # no worker asks before it trains
    with pytest.raises(RuntimeError, match=r"^PermissionError: not with") as caught:
        maker(tmp_path, {**closed, "fails": fails})(WorkerId("w0001"))
    assert "hush" not in "".join(traceback.format_exception(caught.value))


def test_a_worker_knows_what_to_hide_of_later_errors(
    tmp_path: Path, closed: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of every URL in the configuration, and of what fsspec's clients are configured with, too."""
    monkeypatch.setitem(conf, "s3", {"secret": "whisper"})
    url = "https://there/x?sig=mur%2Fmurs&part=3"
    job = maker(tmp_path, {**closed, "fails": "", "elsewhere": [url]})(WorkerId("w0001"))
    assert job.clean(f"PermissionError: not with {closed['storage_options']}") == HIDDEN
    assert job.clean("at /x?sig=mur%2Fmurs&part=3: mur/murs, whisper, said") == "at /x?sig=***&part=3: ***, ***, said"


def prepared(tmp_path: Path, **changes: Any) -> Prepared:
    run = {"name": "r", "storage_path": str(tmp_path / "runs")}
    return prepare(load_config([], values=merged({"run": run, **changes})))


@pytest.mark.usefixtures("text")
def test_workers_elsewhere_find_the_data_and_only_the_data_that_the_run_began_with(
    tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    made = prepared(tmp_path, data={"path": "text.txt"})
    assert made.config.data.path == "text.txt"  # the same run, also if it goes on from elsewhere
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert len(made.maker(WorkerId("w0001")).train) > 100
    text.write_bytes(TEXT.replace(b"a", b"b"))
    with pytest.raises(ConfigError) as caught:
        made.maker(WorkerId("w0002"))
    assert str(caught.value).startswith(f"Python: data.path: {text} has changed since the run began")


@pytest.mark.usefixtures("text")
@pytest.mark.parametrize(
    ("own", "resources", "threads"),
    [(None, {}, "1"), (None, {"CPU": 4}, "4"), (None, {"CPU": 0.5}, "1"), ("3", {"CPU": 4}, "3")],
)
def test_threads_are_the_users_or_as_many_as_a_worker_has_cpus(
    tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch, own: str | None, resources: Any, threads: str
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if own is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", own)
    made = prepared(tmp_path, data={"path": str(text)}, scaling={"resources_per_worker": resources})
    assert environment(made.config)["OMP_NUM_THREADS"] == threads


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


@pytest.mark.usefixtures("text")
def test_what_is_given_to_a_run_that_is_running_and_does_not_count(tmp_path: Path) -> None:
    def given(**changes: Any) -> Prepared:
        values = merged({"data": {"path": str(tmp_path / "text.txt")}, **changes})
        values["run"] = {"name": "r", "storage_path": str(tmp_path / "runs")}
        return prepare(load_config([], values=values))

    first = given(train={"steps": 100})
    write_beginning(first, {}, None)
    assert what_it_keeps(check_same(first), first.config) == []
    more = given(train={"steps": 200}, scaling={"workers": [2, 2], "spares": 1})
    (line,) = what_it_keeps(check_same(more), more.config)
    kept = "train.steps=100, not 200; scaling.spares=0, not 1"
    assert line == f"the running run keeps {kept}; submit again after it has ended to use what is given now"
    for changes, says in (({"steps": 50}, "steps: is 50"), ({"steps": 100, "micro_batch": 1}, "micro_batch: is 1")):
        with pytest.raises(ConfigError, match=f"{says}, but the run in .* has "):
            check_same(given(train=changes))
