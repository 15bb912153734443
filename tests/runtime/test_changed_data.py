"""A worker trains on the data that the run began with, or not at all."""

import os
import signal

import pytest
from ray_runs import SLOWLY, Finished, Site, Started


def failed_starts(started: Started) -> list[str]:
    return [event["error"] for event in started.directory.events() if event["event"] == "start_failed"]


@pytest.mark.soak
def test_a_replacement_that_finds_other_data_is_told_and_none_once_it_is_put_back(site: Site, truth: Finished) -> None:
    original = site.text.read_bytes()
    text = site.folder / "live.txt"
    text.write_bytes(original)
    started = site.start(SLOWLY, f"data.path={text}")
    started.after_step(5)
    os.replace(text, site.folder / "before.txt")
    text.write_bytes(original.replace(b"a", b"b"))
    os.kill(started.directory.read_worlds()[-1]["members"][1]["pid"], signal.SIGKILL)
    while not failed_starts(started):
        assert started.process.poll() is None, started.process.communicate()
        started.process_pause()
    os.replace(site.folder / "before.txt", text)
    done = started.finish()
    assert done.status == 0
    (said,) = failed_starts(started)
    assert "ConfigError: command line: data.path: " in said and "has changed since the run began" in said
    assert done.steps == truth.steps
    losses = [[line["loss"] for line in run.directory.metrics()] for run in (truth, done)]
    assert losses[1] == losses[0]
