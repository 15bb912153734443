"""A run that lost everything goes on from its newest checkpoint, by the same command, as if nothing had happened."""

import json
import shutil
from pathlib import Path
from typing import Any

import psutil
import pytest
from ray_runs import Finished, Site, Started, marked

EVERY = 4
CONFIG: dict[str, Any] = {
    "train": {"steps": 16},
    "checkpoint": {"every_steps": EVERY},
}
LOCAL_RAYS = Path("/tmp")
SAME = ("loss", "grad_norm", "lr", "tokens", "samples")


@pytest.fixture(scope="module")
def truth(tmp_path_factory: pytest.TempPathFactory, shared_ray: str) -> Finished:
    """The run in which nothing happens."""
    return Site(tmp_path_factory.mktemp("truth"), shared_ray).run(CONFIG, name="truth")


def kill_everything(run: Started) -> None:
    """Driver, controller, workers and their Ray, all at once."""
    everybody = marked(run.mark)
    for process in everybody:
        process.kill()
    psutil.wait_procs(everybody)
    run.process.communicate()


def owner(path: Path) -> int:
    return int(json.loads(path.read_text())["pid"])


def check_same(done: Finished, truth: Finished) -> None:
    assert (done.status, done.err) == (0, "")
    lines, expected = done.directory.metrics(), truth.directory.metrics()
    assert [line["step"] for line in lines] == [line["step"] for line in expected]
    for line, other in zip(lines, expected, strict=True):
        assert {key: line[key] for key in SAME} == {key: other[key] for key in SAME}, line["step"]
    final = "final/model.safetensors"
    assert done.directory.files.read(final) == truth.directory.files.read(final)


def test_everything_dies_and_the_same_command_goes_on(alone: Site, truth: Finished) -> None:
    run = alone.start(CONFIG)
    run.after_step(10)
    (left,) = [path.parent for path in LOCAL_RAYS.glob("evenkeel-*/owner.json") if owner(path) == run.process.pid]
    kill_everything(run)
    done = alone.run(CONFIG)
    check_same(done, truth)
    assert not left.exists()  # megabytes, which nobody else would remove
    (restored,) = done.events("restored")
    assert restored["base"] in (EVERY, 2 * EVERY) and "nobody alive holds" in restored["reason"]
    assert restored["base"] + 1 in [step for i, step in enumerate(done.steps) if step in done.steps[:i]]


def test_a_damaged_checkpoint_is_named_and_the_one_before_is_taken(site: Site, truth: Finished) -> None:
    run = site.start(CONFIG)
    run.after_step(10)
    run.process.terminate()
    stopped = run.finish()
    assert stopped.status == 143 and "stopped on request" in stopped.err
    saved = [event["checkpoint"] for event in stopped.events("checkpoint_committed")]
    assert saved[-1] == stopped.steps[-1]  # a stop saves first
    folder = f"checkpoints/step-{saved[-1]:08d}"
    part = next(name for name in stopped.directory.files.names(folder) if name.endswith(".safetensors"))
    data = bytearray(stopped.directory.files.read(f"{folder}/{part}") or b"")
    data[-3] ^= 1
    stopped.directory.files.replace(f"{folder}/{part}", bytes(data))
    done = site.run(CONFIG)
    check_same(done, truth)
    assert part in done.events("checkpoint_damaged")[0]["error"]
    assert done.events("restored")[-1]["base"] == saved[-2]


def test_on_other_workers_and_from_an_earlier_step(site: Site, truth: Finished) -> None:
    """One worker, then two again: another layout moves the last digits of the losses, and nothing else."""
    first = site.run(CONFIG)
    check_same(first, truth)
    alone = {**CONFIG, "scaling": {"workers": [1, 1]}, "parallel": {"data": 1}}
    again = site.run(alone, "--resume", "12")
    assert (again.status, again.err) == (0, "")
    assert again.steps == [*range(1, 17), *range(13, 17)]
    assert [line["samples"] for line in again.directory.metrics()] == [x["samples"] for x in truth.directory.metrics()]
    for line, other in zip(again.directory.metrics(), truth.directory.metrics(), strict=True):
        assert line["loss"] == pytest.approx(other["loss"], rel=1e-5)
    assert len(again.worlds()[-1]["members"]) == 1
    more = site.run({**CONFIG, "train": {**CONFIG["train"], "steps": 18}})
    assert (more.status, more.err) == (0, "")
    assert more.steps[-2:] == [17, 18]


def test_from_the_beginning_when_asked(site: Site, truth: Finished) -> None:
    site.run(CONFIG)
    done = site.run(CONFIG, "--resume", "never")
    check_same(done, truth)
    assert done.steps == [*range(1, 17), *range(1, 17)]


def test_what_cannot_be_resumed_is_one_line(site: Site) -> None:
    site.run(CONFIG)
    wrong = site.run(CONFIG, "--resume", "5")
    assert wrong.status == 2
    assert "has no complete checkpoint of step 5; there are 16, 12" in wrong.err and wrong.err.count("\n") == 1
    other = site.run({**CONFIG, "train": {**CONFIG["train"], "global_batch": 4}})
    assert other.status == 2 and "train.global_batch" in other.err


def test_both_holders_die_and_the_run_goes_back(site: Site, truth: Finished) -> None:
    faults = [{"step": 10, "phase": "backward", "target": f"rank:{rank}", "kind": "kill"} for rank in (0, 1)]
    done = site.run({**CONFIG, "faults": faults, "scaling": {"spares": 1}})
    check_same(done, truth)
    assert len(done.events("worker_lost")) == 2


def test_with_one_copy_a_death_goes_back_and_with_two_it_does_not(site: Site) -> None:
    """Three pipelines, so that two copies are fewer than all."""
    three = {**CONFIG, "scaling": {"workers": [3, 3], "spares": 1}, "parallel": {"data": 3}, "train": {"steps": 16}}
    three["train"] = {**three["train"], "global_batch": 6, "micro_batch": 2}
    fault = [{"step": 10, "phase": "backward", "target": "rank:1", "kind": "kill"}]
    one = site.run({**three, "redundancy": {"copies": 1}, "faults": fault}, name="one")
    two = site.run({**three, "redundancy": {"copies": 2}, "faults": fault}, name="two")
    for done in (one, two):
        assert (done.status, done.err) == (0, "")
        assert [line["step"] for line in done.directory.metrics()] == list(range(1, 17))
    assert [line["loss"] for line in one.directory.metrics()] == [line["loss"] for line in two.directory.metrics()]
    (restored,) = one.events("restored")
    assert "step 9 is lost: nobody alive holds" in restored["reason"] and restored["base"] == 2 * EVERY
    assert two.events("restored") == [] and two.steps == list(range(1, 17))


def test_a_full_disk_is_told_and_training_goes_on(site: Site, truth: Finished) -> None:
    """Nothing can be written where checkpoints go: each is an event, and the run ends well all the same."""
    run = site.start(CONFIG)
    run.after_step(1)
    folder = site.folder / "runs" / "run" / "checkpoints"
    if folder.exists():
        shutil.rmtree(folder)
    folder.write_text("in the way")
    done = run.finish()
    check_same(done, truth)
    assert "checkpoints" in done.events("checkpoint_failed")[0]["error"]
