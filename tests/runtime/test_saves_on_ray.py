"""Cells of the matrix of checkpoints and loads through the whole product: jobs on real Ray, with planned faults."""

import json
from pathlib import Path
from typing import Any

import psutil
import pytest
from ray_runs import EVERY, Finished, Site, Started
from test_resume import check_same, kill_everything

from evenkeel.store.checkpoints import Checkpoints

CONFIG: dict[str, Any] = {"train": {"steps": 28}, "checkpoint": {"every_steps": EVERY}}


@pytest.fixture(scope="module")
def truth(tmp_path_factory: pytest.TempPathFactory, shared_ray: str, corpus: Path) -> Finished:
    return Site(tmp_path_factory.mktemp("truth"), shared_ray, corpus).run(CONFIG)


def fault(step: int, phase: str, target: str, kind: str = "kill") -> dict[str, Any]:
    return {"step": step, "phase": phase, "target": target, "kind": kind}


def saved(run: Finished | Started) -> list[int]:
    """Steps of the complete checkpoints, newest first; none of them is damaged."""
    good, damaged = Checkpoints(run.directory.files).newest_first()
    assert damaged == {} and [error for found in good for error in found.damage(thorough=True)] == []
    return [found.manifest.version.step for found in good]


def check_cell(run: Finished, truth: Finished, fired: int) -> None:
    """It is the same run, and its last step is saved, or it says that and why it is not."""
    check_same(run, truth)
    last, record = truth.steps[-1], run.directory.read_run()
    assert record is not None
    if record.error:
        assert record.error == f"step {last} is not saved: the controller was restarted meanwhile"
    else:
        assert saved(run)[0] == last
    assert len(run.directory.files.names("faults")) == fired


@pytest.mark.soak
def test_a_writer_and_the_controller_die(site: Site, truth: Finished) -> None:
    """The controller twice: before it makes a checkpoint visible, and when it has done so. Workers go on meanwhile."""
    faults = [fault(8, "write", "rank:1"), fault(14, "write", "controller"), fault(20, "written", "controller")]
    done = site.run({**CONFIG, "faults": faults, "scaling": {"spares": 1}})
    check_cell(done, truth, len(faults))
    assert [event["worker_id"] for event in done.events("worker_lost")] == [done.worlds()[0]["members"][1]["worker_id"]]
    assert done.events("restored") == []


@pytest.mark.soak
@pytest.mark.timeout(600)
@pytest.mark.parametrize("phase", ["save", "write", "written"])
def test_workers_die_in_a_checkpoint(site: Site, truth: Finished, phase: str) -> None:
    """One, then the other; then both at once, and one again as it loads; then one with the controller."""
    both = [fault(16, phase, f"rank:{rank}") for rank in (0, 1)]
    pair = [fault(24, phase, "rank:1"), fault(24, "reduce", "controller")]
    faults = [fault(8, phase, "rank:1"), fault(12, phase, "rank:0"), *both, fault(9, "load", "rank:0"), *pair]
    done = site.run({**CONFIG, "faults": faults, "scaling": {"spares": 1}})
    check_cell(done, truth, len(faults))
    assert {event["base"] for event in done.events("restored")} <= {8, 12, 13, 14, 15}


@pytest.mark.soak
@pytest.mark.timeout(600)
@pytest.mark.parametrize("kind", ["stop", "exception", "segv"])
def test_other_faults_in_a_checkpoint(site: Site, truth: Finished, kind: str) -> None:
    """An exception in a writer's thread is an event, one in a load is tried again, one before the copy is a death."""
    faults = [
        fault(8, "write", "rank:1", kind),
        fault(12, "save", "rank:0", kind),
        fault(16, "written", "rank:1", kind),
        *(fault(18, "backward", f"rank:{rank}") for rank in (0, 1)),
        fault(9, "load", "rank:1", kind),
    ]
    done = site.run({**CONFIG, "faults": faults, "scaling": {"spares": 1}})
    check_cell(done, truth, len(faults))


@pytest.mark.soak
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("phase", "target"),
    [(p, "rank:0") for p in ("save", "write", "written")] + [(p, "controller") for p in ("write", "written")],
    ids=lambda value: str(value).replace(":", ""),
)
def test_everything_dies_at_once(alone: Site, truth: Finished, phase: str, target: str) -> None:
    """Held there by SIGSTOP, then driver, controller, workers and their Ray are killed."""
    wanted = {**CONFIG, "faults": [fault(12, phase, target, "stop")]}
    run = alone.start(wanted)
    run.until(lambda: is_stopped(run, target))
    kill_everything(run)
    visible = (phase, target) == ("written", "controller")
    assert saved(run)[0] == (12 if visible else 8)
    done = alone.run(wanted)
    check_cell(done, truth, 1)
    assert [event["base"] for event in done.events("restored")] == [12 if visible else 8]


@pytest.mark.soak
@pytest.mark.timeout(600)
def test_everything_dies_again_while_it_loads(alone: Site, truth: Finished) -> None:
    wanted = {**CONFIG, "faults": [fault(12, "write", "rank:1", "stop"), fault(9, "load", "rank:1", "stop")]}
    for step in (12, 9):
        run = alone.start(wanted)
        run.until(lambda run=run: is_stopped(run, "rank:1"))
        kill_everything(run)
        assert saved(run)[0] == 8, step
    check_cell(alone.run(wanted), truth, 2)


def is_stopped(run: Started, target: str) -> bool:
    """Whether the process is held; false as long as there is none, or it is that of an earlier submission."""
    worlds = run.directory.read_worlds()
    if not worlds:
        return False
    pids = [event["pid"] for event in run.directory.events() if event["event"] == "worker_started"]
    if target == "controller":
        lease = json.loads(run.directory.files.read("lease.json") or b"{}")
        pids = [lease.get("pid", 0)]
    return any(_state(pid) == psutil.STATUS_STOPPED for pid in pids)


def _state(pid: int) -> str:
    try:
        return psutil.Process(pid).status()
    except psutil.NoSuchProcess:
        return psutil.STATUS_DEAD
