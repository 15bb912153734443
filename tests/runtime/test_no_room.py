"""The disk that a run is on becomes full while it trains, and has room again before it is given up."""

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from ray_runs import EVERY, Finished, Site, Started
from stores import slow_data, small_disk
from test_resume import check_same

STEPS = 40
ROOM = 64 << 10
"""Bytes that are left where lines still have room and checkpoints, of some 500 KB, have not."""


@pytest.fixture
def disk(site: Site, tmp_path: Path) -> Iterator[Path]:
    """A disk of 4 MiB, on which the site's runs are."""
    folder = tmp_path / "disk"
    folder.mkdir()
    with small_disk(folder, 4096):
        site.storage = str(folder / "runs")
        yield folder


def config(site: Site, pause_s: float, **checkpoint: Any) -> dict[str, Any]:
    """Steps take twice the pause."""
    section = {"every_steps": EVERY, **checkpoint}
    return {"train": {"steps": STEPS}, "checkpoint": section, "data": slow_data(site, pause_s)}


@pytest.fixture(scope="module")
def truth(tmp_path_factory: pytest.TempPathFactory, shared_ray: str, corpus: Path) -> Finished:
    site = Site(tmp_path_factory.mktemp("truth"), shared_ray, corpus)
    return site.run({"train": {"steps": STEPS}, "checkpoint": {"every_steps": EVERY}})


def fill(disk: Path, room: int) -> Path:
    """A file that leaves so many bytes."""
    filler = disk / "filler"
    with filler.open("wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(4096))
        except OSError:
            file.truncate(max(0, filler.stat().st_size - room))
    return filler


def silence(run: Started, seconds: float) -> Callable[[], bool]:
    """Whether no step has become visible for so long."""
    reader = run.directory.follow("metrics")
    since = time.monotonic()

    def holds() -> bool:
        nonlocal since
        if reader.poll():
            since = time.monotonic()
        return time.monotonic() > since + seconds

    return holds


@pytest.mark.soak
def test_checkpoints_fail_until_there_is_room(site: Site, disk: Path, truth: Finished) -> None:
    run = site.start(config(site, 0.05))
    run.after_step(6)
    filler = fill(disk, ROOM)
    run.until(lambda: run.has_event("checkpoint_failed"))
    at = run.directory.metrics()[-1]["step"]
    run.after_step(at + 3)
    filler.unlink()
    done = run.finish()
    check_same(done, truth)
    failed = done.events("checkpoint_failed")[0]["error"]
    assert f"{disk}/runs/run/checkpoints/" in failed and "No space left on device; free some, or use" in failed
    assert done.events("checkpoint_committed")[-1]["checkpoint"] == STEPS
    assert done.directory.metrics()[-1]["checkpoint_failures"] == len(done.events("checkpoint_failed"))
    assert not list(disk.rglob("*.tmp-*"))


@pytest.mark.soak
def test_lines_wait_until_there_is_room(site: Site, disk: Path, truth: Finished) -> None:
    """Not a byte can be written, so no step becomes visible; those that are trained meanwhile are shown later."""
    run = site.start(config(site, 0.05))
    run.after_step(6)
    filler = fill(disk, 0)
    at = run.directory.metrics()[-1]["step"]
    run.until(silence(run, 3.0))
    filler.unlink()
    done = run.finish()
    check_same(done, truth)
    assert done.steps == list(range(1, STEPS + 1)) and at < STEPS
    told = [event["error"] for event in done.events("storage_trouble") if event["worker_id"] == "controller"]
    assert any("metrics.jsonl: No space left on device" in error or "only" in error for error in told), told


@pytest.mark.soak
def test_so_many_in_a_row_end_the_run_and_with_room_it_goes_on(site: Site, disk: Path, truth: Finished) -> None:
    wanted = config(site, 0.05, max_failures=2)
    run = site.start(wanted)
    run.after_step(6)
    filler = fill(disk, ROOM)
    ended = run.finish()
    assert ended.status == 3 and ended.err.count("\n") == 1
    assert "2 checkpoints in a row could not be written: w" in ended.err
    assert "No space left on device; free some, or use another run.storage_path" in ended.err
    record = ended.directory.read_run()
    assert record is not None and record.status == "failed" and record.error in ended.err
    filler.unlink()
    check_same(site.start(wanted).finish(), truth)
