"""Whole runs on a real S3 server that is cut off, killed, or closed to us."""

import threading
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from ray_runs import EVERY, Finished, Site, marked
from stores import BUCKET, Ceph, Proxy, on_s3, require_ceph, slow_data
from test_resume import check_same, kill_everything

from evenkeel.store.checkpoints import Checkpoints

pytestmark = pytest.mark.rgw
HUSH = "hush-9f3c57e1a2"


@pytest.fixture(scope="module")
def ceph(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ceph]:
    require_ceph()
    server = Ceph(tmp_path_factory.mktemp("ceph"))
    yield server
    server.stop()


@pytest.fixture
def link(ceph: Ceph) -> Iterator[Proxy]:
    proxy = Proxy(ceph.s3.port)
    yield proxy
    proxy.close()


@pytest.fixture
def remote(alone: Site, ceph: Ceph, link: Proxy, monkeypatch: pytest.MonkeyPatch) -> Site:
    return on_s3(alone, ceph.s3, link, monkeypatch)


def config(steps: int) -> dict[str, Any]:
    return {"train": {"steps": steps}, "checkpoint": {"every_steps": EVERY}}


def slow(site: Site, steps: int, pause_s: float) -> dict[str, Any]:
    return {**config(steps), "data": slow_data(site, pause_s)}


def undisturbed(folder: Path, address: str, site: Site, steps: int) -> Finished:
    """The same on local files, where nothing happens."""
    folder.mkdir()
    return Site(folder, address, site.text).run(config(steps))


def check_checkpoints(run: Finished) -> None:
    good, damaged = Checkpoints(run.directory.files).newest_first()
    assert damaged == {} and [error for found in good for error in found.damage(thorough=True)] == []
    assert good[0].manifest.version.step == run.steps[-1]


def kill_at_the_next(name: bytes, link: Proxy, ceph: Ceph) -> threading.Event:
    """Kills the server when a file of this name is about to reach it; set when it is dead."""
    dead = threading.Event()

    def kill() -> None:
        ceph.kill_gateway()
        dead.set()

    link.before_put(name, kill)
    return dead


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("steps", "cut_s", "pause_s", "killed_at"),
    [
        pytest.param(28, 3, 0.1, (b"/manifest.json",), marks=pytest.mark.soak),
        pytest.param(56, 30, 0.4, (b"/manifest.json", b".safetensors"), marks=pytest.mark.soak),
        pytest.param(300, 150, 0.4, (), marks=pytest.mark.soak),  # for longer than anybody else has patience
    ],
)
def test_a_server_that_is_cut_off_and_killed(
    remote: Site,
    ceph: Ceph,
    link: Proxy,
    shared_ray: str,
    tmp_path: Path,
    steps: int,
    cut_s: float,
    pause_s: float,
    killed_at: tuple[bytes, ...],
) -> None:
    """Steps take twice the pause. Meanwhile nobody hears of them, and training goes on."""
    run = remote.start(slow(remote, steps, pause_s))
    run.after_step(3)
    link.cut()
    cut_at = time.time()
    time.sleep(cut_s)
    mended_at = time.time()
    link.mend()
    for name in killed_at:
        dead = kill_at_the_next(name, link, ceph)
        run.until(dead.is_set)
        ceph.start_gateway()
    done = run.finish()
    check_same(done, undisturbed(tmp_path / "local", shared_ray, remote, steps))
    check_checkpoints(done)
    times = [line["time"] for line in done.directory.metrics()]
    thirds = [cut_at + (mended_at - cut_at) * n / 3 for n in range(4)]
    assert all(any(a < t < b for t in times) for a, b in pairwise(thirds)), (thirds, times)
    assert len(done.worlds()) == 1 and done.events("worker_lost") == []
    told = done.events("storage_trouble")
    assert {event["worker_id"] for event in told} >= {"controller"}
    places = (f"http://127.0.0.1:{link.port}", f"s3://{BUCKET}/")
    assert all(any(place in event["error"] for place in places) for event in told), told
    if cut_s >= 30:  # told at once, and not only when the store is back
        assert "the store has failed for" in done.out


@pytest.mark.soak
@pytest.mark.timeout(600)
def test_a_stop_while_the_server_is_away(remote: Site, link: Proxy) -> None:
    """It is heard, though what the run should do first cannot be done; and the run goes on when the server is back."""
    wanted = slow(remote, 40, 0.1)
    run = remote.start(wanted)
    run.after_step(6)
    link.cut()
    run.until_said("the store has failed for")
    run.process.terminate()
    stopped = run.finish()
    assert stopped.status == 143
    assert "stopped on request (SIGTERM, without saving, as the store is out of reach: " in stopped.err
    assert marked(run.mark) == []
    link.mend()
    done = remote.run(wanted)
    assert (done.status, done.err) == (0, "")
    assert [line["step"] for line in done.directory.metrics()] == list(range(1, 41))


@pytest.mark.timeout(600)
def test_everything_dies_and_the_same_command_goes_on(remote: Site, shared_ray: str, tmp_path: Path) -> None:
    wanted = slow(remote, 24, 0.05)
    run = remote.start(wanted)
    run.after_step(10)
    kill_everything(run)
    done = remote.run(wanted)
    check_same(done, undisturbed(tmp_path / "local", shared_ray, remote, 24))
    check_checkpoints(done)
    # It may be all that was visible: lines on an object store are written together.
    assert [world["base_step"] >= EVERY for world in done.worlds()] == [False, True]


@pytest.mark.soak
@pytest.mark.timeout(600)
def test_a_server_that_is_killed_as_the_model_is_written(
    remote: Site, ceph: Ceph, link: Proxy, shared_ray: str, tmp_path: Path
) -> None:
    """What a worker streams cannot be streamed again by itself: it raises, and the next world waits and writes it."""
    run = remote.start(slow(remote, 12, 0.05))
    dead = kill_at_the_next(b"/model.safetensors", link, ceph)
    run.until(dead.is_set)
    time.sleep(5)
    ceph.start_gateway()
    done = run.finish()
    check_same(done, undisturbed(tmp_path / "local", shared_ray, remote, 12))
    check_checkpoints(done)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("AWS_SECRET_ACCESS_KEY", "refuses the secret"),
        pytest.param("AWS_ACCESS_KEY_ID", "does not know the access key", marks=pytest.mark.soak),
    ],
)
def test_a_wrong_key_is_told_before_anything_is_started(
    remote: Site, ceph: Ceph, monkeypatch: pytest.MonkeyPatch, name: str, said: str
) -> None:
    monkeypatch.setenv(name, HUSH)
    run = remote.start(config(8))
    done = run.finish()
    assert (done.status, done.out) == (2, "")
    assert f"run.storage_path: {remote.storage}/" in done.err and said in done.err and done.err.count("\n") == 1
    assert HUSH not in done.err
    assert marked(run.mark) == []
    listed = ceph.s3.client.list_objects_v2(Bucket=BUCKET, Prefix=remote.storage.rpartition("/")[2])
    assert listed["KeyCount"] == 0
