"""Whole runs on real Ray: faults, stops, ends, and what they leave."""

import json
import os
import signal
from typing import Any

import pytest
from ray_runs import Finished, Site, marked

from evenkeel.control import messages as m
from evenkeel.control.controller import Controller
from evenkeel.control.policy import Policy
from evenkeel.core.codec import load
from evenkeel.core.vote import Vote
from evenkeel.runtime.names import controller_name, worker_name
from evenkeel.store.run_directory import RunDirectory


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
    check_finished_again(alone, changes)


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


def check_finished_again(site: Site, changes: dict[str, Any]) -> None:
    """The same command on a finished run sums it up; another configuration is refused by key and both values."""
    again = site.run(changes)
    assert (again.status, again.err) == (0, "")
    assert "finished" in again.out
    other = site.run(changes, "train.learning_rate=0.5")
    assert other.status == 2
    assert "command line: train.learning_rate: is 0.5, but the run in" in other.err
    assert "has 0.01" in other.err


def test_sigterm_stops_after_a_step(site: Site) -> None:
    started = site.start({"train": {"steps": 100_000}})
    started.after_step(3)
    started.process.send_signal(signal.SIGTERM)
    done = started.finish()
    assert done.status == 143
    assert done.err == "evenkeel: stopped on request (SIGTERM)\n"
    record = done.directory.read_run()
    assert record is not None
    assert (record.status, record.error) == ("stopped", "SIGTERM")
    assert done.steps == list(range(1, len(done.steps) + 1))
    assert [event["checkpoint"] for event in done.events("checkpoint_committed")] == [len(done.steps)]


def test_a_second_ctrl_c_ends_everything_at_once(site: Site) -> None:
    started = site.start({"train": {"steps": 100_000}})
    started.after_step(3)
    # A stopped worker cannot reach the next step, so the first request stays open.
    os.kill(started.directory.read_worlds()[-1]["members"][1]["pid"], signal.SIGSTOP)
    started.process.send_signal(signal.SIGINT)
    while not any(e["event"] == "stop_requested" for e in started.directory.events()):
        started.process_pause()
    started.process.send_signal(signal.SIGINT)
    done = started.finish()
    assert done.status == 130
    assert "interrupted" in done.err


def test_an_exception_that_comes_again_ends_the_run(site: Site) -> None:
    faults = [fault(3, "forward", "rank:1", "exception"), fault(3, "backward", "rank:1", "exception")]
    done = site.run({"faults": faults})
    assert done.status == 3
    (line,) = done.err.splitlines()
    assert "failed again after a retry: worker w000" in line
    assert "step 3" in line
    assert "planned fault" in line
    assert done.steps == [1, 2]
    assert len(done.events("exception")) == 2
    logs = RunDirectory.at(done.directory.url).files
    texts = [(logs.read(f"logs/{name}") or b"").decode() for name in logs.names("logs") if name.startswith("w")]
    assert any("Traceback" in text and "planned fault" in text for text in texts)


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


def test_a_stopped_worker_is_found_and_its_process_ended(alone: Site) -> None:
    """SIGSTOP: Ray notices nothing, and calls a stopped process dead long before it is."""
    changes = {"scaling": {"workers": [1, 2]}, "train": {"steps": 10}}
    done = alone.run({**changes, "faults": [fault(4, "forward", "rank:1", "stop")]})
    assert (done.status, done.err) == (0, "")
    assert done.steps == list(range(1, 11))
    (lost,) = done.events("worker_lost")
    assert lost["cause"] == "no answer to a probe"
    assert marked(done.mark) == []


def test_the_controller_dies_and_the_run_goes_on(site: Site) -> None:
    done = site.run({"train": {"steps": 40}, "faults": [fault(8, "commit", "controller", "kill")]})
    assert (done.status, done.err) == (0, "")
    assert done.steps == list(range(1, 41))
    epochs = [e["epoch"] for e in done.directory.journal().read_all() if e["type"] == "EpochBegun"]
    assert epochs == [1, 2]
    started = [e["worker_id"] for e in done.events("worker_started")]
    assert sorted(set(started)) == ["w0001", "w0002"]


def test_no_more_workers_than_there_could_be(site: Site) -> None:
    done = site.run({"scaling": {"workers": [1, 40]}})
    assert done.status == 2
    (line,) = done.err.splitlines()
    assert "scaling.workers: 40 workers (spares included) need 40 CPU, but the cluster at" in line
    assert "6 CPU" in line
    assert not done.directory.exists()


def test_a_name_that_is_running_elsewhere_is_refused(site: Site) -> None:
    started = site.start({"train": {"steps": 100_000}})
    started.after_step(1)
    other = site.run({"train": {"steps": 5}}, f"run.storage_path={site.folder / 'elsewhere'}")
    assert other.status == 2
    assert "a run of this name is running in" in other.err
    started.process.send_signal(signal.SIGTERM)
    assert started.finish().status == 143


@pytest.mark.parametrize("name", ["r", "a b"])
def test_names_of_actors(name: str) -> None:
    assert controller_name(name).startswith(f"{name}/")
    assert worker_name(name, m.WorkerId("w0001")) == f"{name}/w0001"
