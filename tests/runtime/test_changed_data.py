"""A worker trains on the data that the run began with, or not at all."""

import os
import signal

from ray_runs import Site, Started

TEXT = bytes(range(32, 127)) * 100
STEPS = 24
SLOW = {"train": {"steps": STEPS}, "emulate": {"slowdown": {0: 10.0}}}


def failed_starts(started: Started) -> list[str]:
    return [event["error"] for event in started.directory.events() if event["event"] == "start_failed"]


def test_a_replacement_that_finds_other_data_is_told_and_none_once_it_is_put_back(site: Site) -> None:
    truth = site.run({"train": {"steps": STEPS}}, name="truth")
    text = site.folder / "live.txt"
    text.write_bytes(TEXT)
    started = site.start(SLOW, f"data.path={text}", name="changed")
    started.after_step(5)
    os.replace(text, site.folder / "before.txt")
    text.write_bytes(TEXT.replace(b"a", b"b"))
    os.kill(started.directory.read_worlds()[-1]["members"][1]["pid"], signal.SIGKILL)
    while not failed_starts(started):
        assert started.process.poll() is None, started.process.communicate()
        started.process_pause()
    os.replace(site.folder / "before.txt", text)
    done = started.finish()
    assert done.status == 0
    (said,) = failed_starts(started)
    assert "ConfigError: command line: data.path: " in said and "has changed since the run began" in said
    assert done.steps == list(range(1, STEPS + 1))
    losses = [[line["loss"] for line in run.directory.metrics()] for run in (truth, done)]
    assert losses[1] == losses[0]
