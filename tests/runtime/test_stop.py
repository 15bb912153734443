"""Requests to stop, at every moment of a run, and what they leave; and runs that nobody attends to any more."""

import os
import signal
from pathlib import Path
from typing import Any

import psutil
import pytest
from ray_runs import FOREVER, Site, Started, marked

from evenkeel.store.lease import read_lease


def catches(process: psutil.Process, number: int) -> bool:
    """Whether the process has a handler for the signal."""
    status = Path(f"/proc/{process.pid}/status").read_text()
    (mask,) = [line.split()[1] for line in status.splitlines() if line.startswith("SigCgt:")]
    return bool(int(mask, 16) >> number - 1 & 1)


def imports(run: Started) -> bool:
    return catches(psutil.Process(run.process.pid), signal.SIGTERM)


def starts_ray(run: Started) -> bool:
    return any("gcs_server" in process.name() for process in psutil.Process(run.process.pid).children())


@pytest.mark.parametrize(
    ("moment", "number"),
    [(imports, signal.SIGINT), pytest.param(starts_ray, signal.SIGTERM, marks=pytest.mark.soak)],
)
def test_before_there_is_a_run(alone: Site, moment: Any, number: int) -> None:
    """To the whole process group, as terminals and supervisors do."""
    started = alone.start(FOREVER)
    started.until(lambda: moment(started))
    os.killpg(started.process.pid, number)
    done = started.finish()
    assert (done.status, done.out) == (143, "")
    assert done.err == f"evenkeel: stopped on request ({signal.Signals(number).name})\n"
    assert not done.directory.exists()
    assert marked(done.mark) == []


def test_sigterm_to_the_process_group(alone: Site) -> None:
    """Ray's own processes do not hear of it: the run needs them to stop."""
    started = alone.start(FOREVER)
    started.after_step(3)
    os.killpg(started.process.pid, signal.SIGTERM)
    done = started.finish()
    assert (done.status, done.err) == (143, "evenkeel: stopped on request (SIGTERM)\n")
    record = done.directory.read_run()
    assert record is not None
    assert (record.status, record.error) == ("stopped", "SIGTERM")
    assert [e["checkpoint"] for e in done.events("checkpoint_committed")] == [len(done.steps)]
    assert marked(done.mark) == []


def test_a_local_ray_that_is_killed(alone: Site) -> None:
    """The run dies with it, and its end is told and written down at once."""
    started = alone.start(FOREVER)
    started.after_step(3)
    lease = read_lease(started.directory.files)
    assert lease is not None and psutil.Process(lease.holder.ray_pid).name() == "gcs_server"
    (raylet,) = [p for p in psutil.Process(started.process.pid).children() if p.name() == "raylet"]
    raylet.kill()
    done = started.finish()
    assert (done.status, done.err) == (3, "evenkeel: the local Ray has died (raylet)\n")
    record = done.directory.read_run()
    assert record is not None and record.status == "failed"
    assert marked(done.mark) == []


def test_a_second_ctrl_c_ends_everything_at_once(site: Site) -> None:
    """And until then nobody else can have a run of this name."""
    started = site.start({**FOREVER, "scaling": {"workers": [2, 2]}, "parallel": {"data": 2}})
    started.after_step(3)
    other = site.run({"train": {"steps": 5}}, f"run.storage_path={site.folder / 'elsewhere'}")
    assert other.status == 2
    assert f"a run of this name is running in {started.directory.url}; choose another run.name" in other.err
    # A stopped worker cannot reach the next step, so the first request stays open.
    os.kill(started.pids()[1], signal.SIGSTOP)
    started.process.send_signal(signal.SIGINT)
    started.until(lambda: started.has_event("stop_requested"))
    started.process.send_signal(signal.SIGINT)
    done = started.finish()
    assert done.status == 130
    assert "interrupted" in done.err
    record = done.directory.read_run()
    assert record is not None and record.status == "stopped"


def test_a_request_is_not_lost_with_the_controller(site: Site) -> None:
    """The first one comes to a controller that is dead already."""
    started = site.start(FOREVER)
    started.after_step(3)
    os.kill(started.controller(), signal.SIGKILL)
    started.process.terminate()
    done = started.finish()
    assert (done.status, done.err) == (143, "evenkeel: stopped on request (SIGTERM)\n")
    assert epochs(started) == [1, 2]


@pytest.mark.soak
def test_deaths_while_a_restarted_controller_looks_for_its_workers(site: Site) -> None:
    """One worker does not answer it and another dies meanwhile; and the stop that was asked for is asked for again."""
    started = site.start({**FOREVER, "scaling": {"workers": [1, 3]}, "parallel": {"data": 3}})
    started.after_step(3)
    _, killed, stopped = started.pids()
    os.kill(stopped, signal.SIGSTOP)
    started.process.terminate()
    started.until(lambda: started.has_event("stop_requested"))
    os.kill(started.controller(), signal.SIGKILL)
    started.until(lambda: (lease := read_lease(started.directory.files)) is not None and lease.epoch == 2)
    started.process_pause()  # now it looks for them, and the first has answered
    os.kill(killed, signal.SIGKILL)
    done = started.finish()
    assert (done.status, done.err) == (143, "evenkeel: stopped on request (SIGTERM)\n")
    assert done.steps == list(range(1, len(done.steps) + 1))
    assert [len(world["members"]) for world in done.worlds()] == [3, 1]
    assert epochs(started) == [1, 2]
    assert len(done.events("stop_requested")) >= 2


def epochs(run: Started) -> list[int]:
    return [e["epoch"] for e in run.directory.journal().read_all() if e["type"] == "EpochBegun"]


def test_without_a_driver(site: Site) -> None:
    """After a while the run saves and stops, and can be gone on with at once; before that it is found again."""
    first = site.start({**FOREVER, "run": {"orphan_minutes": 0.05}})
    first.after_step(3)
    first.kill()
    while not (record := first.directory.read_run()) or not record.over:
        first.process_pause()
    assert record.status == "stopped" and record.error.startswith("without a driver for ")
    steps = first.directory.metrics()[-1]["step"]
    second = site.start(FOREVER)
    second.after_step(steps + 1)
    second.kill()
    third = site.start(FOREVER)
    assert third.process.stdout is not None
    lines = iter(third.process.stdout.readline, "")
    assert any("is ready" in line for line in lines)  # it is told what was before it came
    third.process.terminate()
    done = third.finish()
    assert (done.status, done.err) == (143, "evenkeel: stopped on request (SIGTERM)\n")
    assert done.steps == list(range(1, len(done.steps) + 1))
    assert len(done.worlds()) == len(epochs(third)) == 2
