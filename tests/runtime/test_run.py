"""Whole runs on real Ray: faults, stops, ends, and what they leave."""

import json
import os
from typing import Any

import pytest
from ray_runs import ONE, Finished, Site, marked

from evenkeel.control import messages as m
from evenkeel.control.controller import Controller
from evenkeel.control.policy import Policy
from evenkeel.core.codec import load
from evenkeel.core.vote import Vote
from evenkeel.runtime.names import controller_name, worker_name


def fault(step: int, phase: str, target: str, kind: str) -> dict[str, Any]:
    return {"step": step, "phase": phase, "target": target, "kind": kind}


def test_a_spare_takes_over_and_nothing_is_left(alone: Site) -> None:
    """On a Ray of the run's own, which has to be gone at the end with everything on it."""
    changes = {"scaling": {"spares": 1}, "train": {"steps": 12, "eval_every": 6}}
    done = alone.run({**changes, "faults": [fault(5, "backward", "rank:1", "kill")]})
    assert (done.status, done.err) == (0, "")
    assert done.steps == list(range(1, 13))
    assert [line["samples"] for line in done.directory.metrics()] == [[8 * s, 8 * s + 8] for s in range(12)]
    before, after = done.worlds()
    assert after["cause"] == "worker lost"
    pids = {member["rank"]: member["pid"] for member in before["members"]}
    assert after["members"][0]["pid"] == pids[0]
    assert after["members"][1]["pid"] not in pids.values()
    assert after["members"][1]["worker_id"] not in [member["worker_id"] for member in before["members"]]
    (lost,) = done.events("worker_lost")
    assert lost["worker_id"] == before["members"][1]["worker_id"]
    (incident,) = done.events("incident")
    assert set(incident["phases"]) == {"detect", "abort", "settle", "plan", "regroup", "reshard", "first_step"}
    assert {e["version"] for e in done.events("validation")} >= {12}
    assert "healed in" in done.out
    assert "run finished" in done.out.splitlines()
    record = done.directory.read_run()
    assert record is not None
    assert record.status == "finished"
    assert done.directory.files.names("final") == ["config.json", "model.safetensors"]
    assert marked(done.mark) == []
    check_replay(done)


def check_replay(done: Finished) -> None:
    """Conformance: what the controller heard, told to a fresh one, leads to the same commands, entries and lines."""
    folder = done.directory.log_folder
    assert folder is not None
    with open(os.path.join(folder, "controller-trace.jsonl"), encoding="utf-8") as file:
        head, *lines = map(json.loads, file)
    controller = Controller(load(head["policy"], Policy), head["epoch"])
    entries: list[m.Entry] = []
    votes: list[Vote] = []
    events: list[str] = []
    for line in lines:
        output = controller.step(line["now"], load(line["event"], m.Event))
        said = [f"{type(c).__name__} {getattr(c, 'worker_id', '')}".rstrip() for c in output.commands]
        assert said == line["commands"]
        entries += output.journal
        votes += [c.vote for c in output.commands if isinstance(c, m.Metrics)]
        events += [c.event for c in output.commands if isinstance(c, m.Log)]
    assert entries == [load(entry, m.Entry) for entry in done.directory.journal().read_all()]
    assert [list(v.values) for v in votes] == [line["vote"] for line in done.directory.metrics()]
    assert events == [event["event"] for event in done.directory.events()]


def test_an_exception_that_comes_again_ends_the_run(site: Site) -> None:
    faults = [fault(3, "forward", "rank:0", "exception"), fault(3, "backward", "rank:0", "exception")]
    done = site.run({**ONE, "faults": faults})
    assert done.status == 3
    (line,) = done.err.splitlines()
    assert "failed again after a retry: worker w000" in line
    assert "step 3" in line
    assert "planned fault" in line
    worker = done.events("exception")[-1]["worker_id"]
    assert line.endswith(f"(traceback in {done.directory.files.where(f'logs/{worker}.log')})")
    assert done.steps == [1, 2]
    assert len(done.events("exception")) == 2
    text = (done.directory.files.read(f"logs/{worker}.log") or b"").decode()
    assert "Traceback" in text and "planned fault" in text


def test_a_loss_that_stays_not_finite_ends_the_run(site: Site) -> None:
    train = {"learning_rate": 1e38, "warmup_steps": 0, "max_bad_steps": 3}
    done = site.run({**ONE, "model": {"layers": 1}, "train": train})
    assert done.status == 3
    assert done.steps == [1, 2, 3, 4]
    (line,) = done.err.splitlines()
    assert line.startswith("evenkeel: step 4: loss or gradient not finite in 3 steps in a row; w0001 met ")
    assert "the gradients of " in line and line.endswith("not finite in step 4")
    assert not done.directory.files.names("final")


def test_a_step_that_takes_workers_down_three_times_ends_the_run(site: Site) -> None:
    """Each of the worlds that try it is smaller than the one before."""
    changes = {"scaling": {"workers": [1, 4]}, "parallel": {"data": 4}}
    deaths = [fault(3, "forward", "rank:0", "kill"), fault(3, "backward", "rank:0", "kill")]
    done = site.run({**changes, "faults": [*deaths, fault(3, "reduce", "rank:0", "kill")]})
    assert done.status == 3
    assert done.err.startswith("evenkeel: step 3 took workers down 3 times: ")
    assert "Traceback" not in done.err and "traceback in" not in done.err and done.err.count("\n") == 1
    assert done.steps == [1, 2]
    assert len(done.events("worker_lost")) == 3


def test_state_that_nobody_holds_any_more_is_named(site: Site) -> None:
    """Two stages of one pipeline: what the dead one held has no other holder, and there is no checkpoint yet."""
    changes = {"parallel": {"data": 1, "pipeline": 2}, "scaling": {"workers": [1, 2], "spares": 1}}
    done = site.run({**changes, "faults": [fault(4, "forward", "rank:1", "kill")]})
    assert (done.status, done.err) == (0, "")
    (restored,) = done.events("restored")
    assert "step 3 is lost: nobody alive holds" in restored["reason"]
    assert "back to the beginning" in restored["reason"]
    assert done.steps == [1, 2, 3, *range(1, 9)]
    assert [line["step"] for line in done.directory.metrics()] == list(range(1, 9))


@pytest.mark.soak
def test_a_stopped_worker_is_found_and_its_process_ended(alone: Site) -> None:
    """SIGSTOP: Ray notices nothing, and calls a stopped process dead long before it is.

    The local Ray has room for both of the workers, though they take parts of a CPU each.
    """
    changes = {"scaling": {"workers": [1, 2], "resources_per_worker": {"CPU": 0.7}}, "train": {"steps": 10}}
    done = alone.run({**changes, "faults": [fault(4, "forward", "rank:1", "stop")]})
    assert (done.status, done.err) == (0, "")
    assert done.steps == list(range(1, 11))
    (lost,) = done.events("worker_lost")
    assert lost["cause"] == "no answer to a probe"
    assert marked(done.mark) == []


def test_no_more_workers_than_there_could_be(site: Site) -> None:
    done = site.run({"scaling": {"workers": [1, 40]}})
    assert done.status == 2
    (line,) = done.err.splitlines()
    assert "scaling.workers: 40 workers (spares included) need 40 CPU, but the cluster has at most 6 CPU" in line
    assert not done.directory.exists()


@pytest.mark.parametrize("name", ["r", "a b"])
def test_names_of_actors(name: str) -> None:
    assert controller_name(name).startswith(f"{name}/")
    assert worker_name(name, m.WorkerId("w0001")) == f"{name}/w0001"
