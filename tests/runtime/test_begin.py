"""How a run begins: bad storage, several who begin it at once, a controller that dies meanwhile, jobs as they lie."""

import os
import signal
import sys
import venv
from pathlib import Path
from typing import Any

import pytest
import ray
import yaml
from ray_runs import FOREVER, ONE, ROOT, Finished, Site, merged

from evenkeel.config import load_config
from evenkeel.runtime.names import NAMESPACE
from evenkeel.trainer import run


@pytest.mark.parametrize(("path", "problem"), [("memory://runs", "is memory of one process"), ("file", "file")])
def test_storage_that_cannot_be_used(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, path: str, problem: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_bytes(bytes(range(32, 127)) * 20)
    values = merged({"data": {"path": "file"}, "run": {"name": "r", "storage_path": path}})
    assert run(load_config([], values=values)) == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.count("\n") == 1
    assert said.err.startswith("evenkeel: Python: run.storage_path: ")
    assert problem in said.err


def test_workers_that_are_being_started_are_waited_for_by_the_next_controller_and_outlive_it(site: Site) -> None:
    fault = {"step": 8, "phase": "commit", "target": "controller", "kind": "kill"}
    started = site.start({"train": {"steps": 40}, "faults": [fault]})
    starting = {f"run/w000{n}" for n in (1, 2)}
    listed = ray.util.list_named_actors
    started.until(lambda: starting <= {e["name"] for e in listed(True) if e["namespace"] == NAMESPACE})
    os.kill(started.controller(), signal.SIGKILL)
    done = started.finish()
    assert (done.status, done.err) == (0, "")
    assert done.steps == list(range(1, 41))
    assert {event["worker_id"] for event in done.events("worker_started")} == {"w0001", "w0002"}
    assert [e["epoch"] for e in done.directory.journal().read_all() if e["type"] == "EpochBegun"] == [1, 2, 3]


def outcome(done: Finished) -> Any:
    """The learning rate that the run in this directory has."""
    return yaml.safe_load(done.directory.read_config() or "")["train"]["learning_rate"]


def test_of_several_who_begin_it_at_once_one_does_and_those_who_want_the_same_attach(site: Site) -> None:
    rates = [0.01, 0.01, 0.5]
    all_done = [run.finish() for run in [site.start(ONE, f"train.learning_rate={rate}") for rate in rates]]
    for rate, done in zip(rates, all_done, strict=True):
        if rate == outcome(done):
            assert (done.status, done.err) == (0, "")
            assert "run finished" in done.out.splitlines()
        else:
            assert done.status == 2
            assert f"command line: train.learning_rate: is {rate}, but the run in" in done.err
        assert done.steps == list(range(1, 9))
        assert len(done.worlds()) == 1


def test_who_attaches_needs_no_room_and_is_told_what_does_not_count(site: Site) -> None:
    first = site.start(FOREVER)
    first.after_step(2)
    other = site.start(FOREVER, "train.steps=200000", "scaling.workers=[1,40]")
    assert other.process.stdout is not None
    lines = iter(other.process.stdout.readline, "")
    told = next(line for line in lines if "keeps" in line)
    assert told.startswith("the running run keeps train.steps=100000, not 200000; scaling.workers")
    assert any("step " in line and "/100000" in line for line in lines)
    other.process.terminate()
    for started in (other, first):
        done = started.finish()
        assert (done.status, done.err) == (143, "evenkeel: stopped on request (SIGTERM)\n")
    assert len(done.worlds()) == 1


@pytest.mark.soak
def test_of_two_rays_that_begin_it_at_once_one_is_refused(alone: Site) -> None:
    both = {rate: alone.start(FOREVER, f"train.learning_rate={rate}") for rate in (0.01, 0.5)}
    winner, loser = both.values()
    while loser.process.poll() is None:
        loser.process_pause()
        if winner.process.poll() is not None:
            winner, loser = loser, winner
    winner.after_step(2)
    refused = loser.finish()
    assert refused.status == 2 and refused.err.count("\n") == 1
    assert "runs it in another cluster; stop that one first" in refused.err
    winner.process.terminate()
    done = winner.finish()
    assert (done.status, done.err) == (143, "evenkeel: stopped on request (SIGTERM)\n")
    assert both[outcome(done)] is winner
    assert done.steps == list(range(1, len(done.steps) + 1))
    record = done.directory.read_run()
    assert record is not None and (record.status, record.error) == ("stopped", "SIGTERM")


@pytest.fixture
def bare_python(tmp_path: Path) -> str:
    """A Python with all that evenkeel needs, but without evenkeel."""
    folder = tmp_path / "venv"
    venv.create(folder, symlinks=True)
    (packages,) = folder.glob("lib/python*/site-packages")
    ours = [path for path in sys.path if path.endswith("site-packages") and Path(path) != packages]
    (packages / "dependencies.pth").write_text("\n".join(ours))
    return str(folder / "bin" / "python")


def test_jobs_find_evenkeel_and_so_do_their_actors(alone: Site, bare_python: str) -> None:
    alone.python = bare_python
    assert "No module named 'evenkeel'" in alone.command(bare_python, "-c", "import torch, ray, evenkeel").stderr
    done = alone.run(ONE)
    assert (done.status, done.err) == (0, "")
    simulated = alone.command(bare_python, str(ROOT / "jobs" / "simulate.py"), "--seeds", "0:2")
    assert simulated.returncode == 0 and "2 ok" in simulated.stdout
    # That it knows its benchmarks by name: it has imported what they run.
    measured = alone.command(bare_python, str(ROOT / "jobs" / "benchmark.py"), "nothing")
    assert measured.returncode == 2 and "'nothing' is not known; expected one of throughput" in measured.stderr
