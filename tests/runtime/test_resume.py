"""A run that lost everything goes on from its newest checkpoint, by the same command, as if nothing had happened."""

import json
import shutil
from pathlib import Path

import psutil
import pytest
from ray_runs import EVERY, SAVING, SLOWLY, Finished, Site, Started, marked, steps_in

LOCAL_RAYS = Path("/tmp")
SAME = ("loss", "grad_norm", "lr", "tokens", "samples")


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


@pytest.mark.soak
def test_everything_dies_and_the_same_command_goes_on(alone: Site, truth: Finished) -> None:
    run = alone.start(SLOWLY)
    run.after_step(10)
    (left,) = [path.parent for path in LOCAL_RAYS.glob("evenkeel-*/owner.json") if owner(path) == run.process.pid]
    kill_everything(run)
    seen = steps_in(run.directory)
    done = alone.run(SAVING)
    check_same(done, truth)
    assert not left.exists()  # megabytes, which nobody else would remove
    (restored,) = done.events("restored")
    base = restored["base"]
    assert base in range(EVERY, 16, EVERY) and "nobody alive holds" in restored["reason"]
    assert done.steps == [*seen, *range(base + 1, 17)]


@pytest.mark.soak
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_taken(site: Site, truth: Finished) -> None:
    run = site.start(SLOWLY)
    run.after_step(10)
    run.process.terminate()
    stopped = run.finish()
    assert stopped.status == 143 and "stopped on request" in stopped.err
    *_, before, newest = sorted(saved(stopped))
    assert newest == stopped.steps[-1]  # a stop saves first
    folder = f"checkpoints/step-{newest:08d}"
    part = next(name for name in stopped.directory.files.names(folder) if name.endswith(".safetensors"))
    data = bytearray(stopped.directory.files.read(f"{folder}/{part}") or b"")
    data[-3] ^= 1
    stopped.directory.files.replace(f"{folder}/{part}", bytes(data))
    done = site.run(SAVING)
    check_same(done, truth)
    assert part in done.events("checkpoint_damaged")[0]["error"]
    assert done.events("restored")[-1]["base"] == before


def test_from_the_beginning_and_from_a_step_on_another_worker(site: Site, truth: Finished) -> None:
    """One in place of two: another layout moves the last digits of the losses, and nothing else."""
    site.copy(truth)
    anew = site.run(SAVING, resume="never")
    check_same(anew, truth)
    steps = [*range(1, 17), *range(1, 17)]
    assert anew.steps == steps
    one = {**SAVING, "scaling": {"workers": [1, 1]}, "parallel": {"data": 1}}
    again = site.run(one, resume="12")
    assert (again.status, again.err) == (0, "")
    assert again.steps == [*steps, *range(13, 17)]
    assert [line["samples"] for line in again.directory.metrics()] == [x["samples"] for x in truth.directory.metrics()]
    for line, other in zip(again.directory.metrics(), truth.directory.metrics(), strict=True):
        assert line["loss"] == pytest.approx(other["loss"], rel=1e-5)
    assert len(again.worlds()[-1]["members"]) == 1


def test_what_has_finished_is_summed_up_and_nothing_changes_what_it_was(site: Site, truth: Finished) -> None:
    """Neither the same command nor one that is refused, in one line with the key and both values."""
    site.copy(truth)
    before = contents(site)
    again = site.run(SAVING)
    assert (again.status, again.err) == (0, "")
    assert "run finished" in again.out.splitlines()
    *_, earlier, last = sorted(saved(truth))
    rate = "train.learning_rate: is 0.5, but the run in"
    for refused, says in (
        (site.run(SAVING, resume="5"), f"has no complete checkpoint of step 5; there are {last}, {earlier}"),
        (site.run(SAVING, "train.learning_rate=0.5"), f"command line: {rate} {again.directory.url} has 0.01"),
        (site.run({**SAVING, "train": {"steps": 16, "global_batch": 4}}), "train.global_batch: is 4, but"),
    ):
        assert refused.status == 2
        assert says in refused.err and refused.err.count("\n") == 1
    assert contents(site) == before


def test_it_goes_on_in_a_cluster_that_has_got_smaller(site: Site, truth: Finished) -> None:
    """There is no room for the third worker; a run that begins like this is refused, as is one without the fewest."""
    site.copy(truth)
    scaling = {"workers": [1, 3], "resources_per_worker": {"CPU": 3.0}}
    more = site.run({**SAVING, "train": {"steps": 18}, "scaling": scaling})
    assert (more.status, more.err) == (0, "")
    short = "3 workers (spares included) need 9 CPU, but the cluster has at most 6 CPU"
    assert f"it goes on with fewer: {short}" in more.out.splitlines()
    assert more.steps == list(range(1, 19))
    assert len(more.worlds()[-1]["members"]) == 2
    anew = site.run({**SAVING, "scaling": scaling}, name="anew")
    assert anew.status == 2 and f"scaling.workers: {short}" in anew.err
    assert not anew.directory.exists()
    fewest = site.run({**SAVING, "train": {"steps": 20}, "scaling": {**scaling, "workers": [3, 3]}})
    assert fewest.status == 2 and "3 workers (the fewest that train) need 9 CPU" in fewest.err


def saved(done: Finished) -> dict[int, float]:
    """Steps of its checkpoints, and when each was first complete. Whoever is still writing one puts off the next."""
    committed = done.events("checkpoint_committed")
    return {event["checkpoint"]: event["time"] for event in reversed(committed)}


def contents(site: Site) -> dict[Path, bytes]:
    """Of all runs, but for who was about to run them."""
    files = [path for path in (site.folder / "runs").rglob("*") if path.is_file() and "lease" not in str(path)]
    return {path: path.read_bytes() for path in files}


def test_both_holders_die_and_the_run_goes_back(site: Site, truth: Finished) -> None:
    faults = [{"step": 10, "phase": "backward", "target": f"rank:{rank}", "kind": "kill"} for rank in (0, 1)]
    done = site.run({**SAVING, "faults": faults, "scaling": {"spares": 1}})
    check_same(done, truth)
    assert len(done.events("worker_lost")) == 2


@pytest.mark.soak
def test_with_one_copy_a_death_goes_back_and_with_two_it_does_not(site: Site) -> None:
    """Three pipelines, so that two copies are fewer than all."""
    three = {**SAVING, "scaling": {"workers": [3, 3], "spares": 1}, "parallel": {"data": 3}}
    three["train"] = {"steps": 16, "global_batch": 6, "micro_batch": 2}
    fault = [{"step": 10, "phase": "backward", "target": "rank:1", "kind": "kill"}]
    one = site.run({**three, "redundancy": {"copies": 1}, "faults": fault}, name="one")
    two = site.run({**three, "redundancy": {"copies": 2}, "faults": fault}, name="two")
    for done in (one, two):
        assert (done.status, done.err) == (0, "")
        assert [line["step"] for line in done.directory.metrics()] == list(range(1, 17))
    assert [line["loss"] for line in one.directory.metrics()] == [line["loss"] for line in two.directory.metrics()]
    (restored,) = one.events("restored")
    assert "step 9 is lost: nobody alive holds" in restored["reason"]
    before = [step for step, at in saved(one).items() if at < restored["time"]]
    assert restored["base"] == max(before, default=0)
    assert two.events("restored") == [] and two.steps == list(range(1, 17))


def test_checkpoints_that_cannot_be_written_and_a_worker_made_slow_are_told(site: Site, truth: Finished) -> None:
    """A file is where the checkpoints' folder should be: each is an event, and the run ends well all the same."""
    run = site.start({**SAVING, "emulate": {"slowdown": {1: 3.0}, "from_step": 3, "to_step": 9}})
    run.after_step(1)
    folder = site.folder / "runs" / "run" / "checkpoints"
    if folder.exists():
        shutil.rmtree(folder)
    folder.write_text("in the way")
    done = run.finish()
    check_same(done, truth)
    assert "checkpoints" in done.events("checkpoint_failed")[0]["error"]
    (emulated,) = done.events("emulated")
    assert emulated["slowdown"] == {"1": 3.0} and (emulated["from_step"], emulated["to_step"]) == (3, 9)
    text = "rank 1 takes 3 times as long on purpose in steps 3 to 9"
    assert f"emulation: {text}" in done.out and f"  emulation   {text}" in done.out
