"""The lease: one taker of many, the dead give way, the living are named."""

import json
import multiprocessing
import os
import re
import signal
import subprocess
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
from children import PATIENCE_S, ROUNDS, at_once, briefly, hold, race
from servers import BUCKET

from evenkeel.store import lease as lease_module
from evenkeel.store.errors import StoreError
from evenkeel.store.files import Files, LocalFiles, open_files
from evenkeel.store.lease import (
    ELSEWHERE,
    FOLDER,
    LEASE_S,
    RENEW_S,
    SHOWN,
    Holder,
    Lease,
    LeaseHeld,
    LeaseLost,
    Watch,
    acquire,
    decide,
    read_lease,
    succeed,
)

pytestmark = pytest.mark.stores("moto", "rgw")
_context = multiprocessing.get_context("spawn")

HERE = Holder.this("cluster-b")
AWAY = replace(HERE, host="elsewhere")


def lease_of(holder: Holder, tenure: int = 1) -> Lease:
    return Lease(tenure, holder, 3, 1.75e9, 1.75e9, False, "x")


# ------------------------------------------------------------ the decision


OTHER = replace(HERE, cluster="cluster-a", pid=4242, host="host-a")
WHO = "process 4242 on host host-a, started 2025-06-15 15:06:40 UTC"


@pytest.mark.parametrize(
    ("lease", "dead", "changed", "unchanged_s", "action", "reason"),
    [
        (None, False, False, 0.0, "take", "nobody runs it"),
        (lease_of(OTHER), True, False, 0.0, "take", f"{WHO}, is dead"),
        (lease_of(OTHER), False, False, LEASE_S - 0.1, "wait", f"{WHO}, may be alive"),
        (lease_of(OTHER), False, False, LEASE_S, "take", f"{WHO}, has not been heard of for 14 s"),
        (lease_of(OTHER), False, True, 1.0, "refuse", f"{WHO}, runs it in another cluster"),
        (lease_of(OTHER), True, True, 1.0, "take", f"{WHO}, is dead"),
        (replace(lease_of(OTHER), released=True), False, True, 0.0, "take", f"{WHO}, has ended"),
        (lease_of(replace(OTHER, cluster="cluster-b")), False, True, 1.0, "attach", f"{WHO}, runs it in this cluster"),
        (lease_of(replace(OTHER, cluster="cluster-b")), True, True, 1.0, "take", f"{WHO}, is dead"),
        (lease_of(HERE), False, False, 0.0, "keep", "an earlier attempt of this process"),
    ],
)
def test_what_to_do(
    lease: Lease | None, dead: bool, changed: bool, unchanged_s: float, action: str, reason: str
) -> None:
    decision = decide(lease, HERE, dead, changed, unchanged_s)
    assert (decision.action, decision.reason[: len(reason)]) == (action, reason)


def test_only_what_can_be_seen_is_dead() -> None:
    child = subprocess.Popen(["sleep", "1000"])
    alive = replace(HERE, pid=child.pid, process_start=_process_start(child.pid))
    try:
        assert not alive.is_dead(HERE)
        assert replace(alive, process_start=alive.process_start + 1).is_dead(HERE), "the pid was given to another"
        child.kill()
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
        assert alive.is_dead(HERE), "a zombie"
    finally:
        child.kill()
        child.wait()
    assert alive.is_dead(HERE)
    for unlike in ({"host": "other"}, {"boot_id": "other"}, {"pid_namespace": "pid:[1]"}):
        assert not replace(alive, **unlike).is_dead(HERE)


def test_one_that_its_ray_would_start_again_is_not_dead() -> None:
    """But within that Ray, which is asked itself."""
    ray, child = (subprocess.Popen(["sleep", "1000"]) for _ in range(2))
    try:
        who = replace(HERE, cluster="cluster-a", pid=child.pid, process_start=_process_start(child.pid))
        restarted = replace(who, ray_pid=ray.pid, ray_start=_process_start(ray.pid))
        elsewhere = replace(who, ray_pid=ELSEWHERE)
        assert not who.is_dead(HERE)
        child.kill()
        child.wait()
        assert who.is_dead(HERE)
        assert not restarted.is_dead(HERE) and not elsewhere.is_dead(HERE)
        assert restarted.is_dead(restarted) and elsewhere.is_dead(elsewhere)
    finally:
        for process in (ray, child):
            process.kill()
            process.wait()
    assert restarted.is_dead(HERE) and not elsewhere.is_dead(HERE)


def test_a_controller_that_is_being_restarted_is_waited_for(files: Files) -> None:
    """And when everything is dead, its Ray too, its run is taken at once."""
    with subprocess.Popen(["sleep", "1000"]) as ray:
        gone = Holder.this("cluster-a", ray.pid)
        held = acquire(files, replace(gone, process_start=gone.process_start + 1), at_once)
        assert held is not None
        with pytest.raises(LeaseHeld, match="may be alive; stop that one first, by Ctrl-C or SIGTERM to its command"):
            acquire(files, HERE, lambda seconds: True)
        held.renew()  # as its next life does
        ray.kill()
    tenure = acquire(files, HERE, at_once)
    assert tenure is not None and tenure.reason == f"{held.lease.who}, is dead"


def test_a_lease_of_the_format_before_is_read(files: Files) -> None:
    lease = lease_of(OTHER)
    values = json.loads(lease.to_json())
    values["format"] = 1
    del values["ray_pid"], values["ray_start"]
    files.create(f"{FOLDER}/000001.json", json.dumps(values).encode())
    assert read_lease(files) == lease


def _process_start(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])


# ------------------------------------------------------------ one holder


def test_the_file_says_who_runs_it(files: Files) -> None:
    tenure = acquire(files, HERE, at_once)
    assert tenure is not None and tenure.reason == "nobody runs it"
    tenure.renew(epoch=7)
    tenure.renew()
    said = json.loads(files.read(SHOWN) or b"")
    assert (said["format"], said["cluster"], said["pid"], said["epoch"]) == (2, "cluster-b", os.getpid(), 7)
    assert {"host", "boot_id", "start", "renewed"} <= said.keys()
    assert read_lease(files) == tenure.lease


def test_it_is_due_some_times_in_a_lease(files: Files) -> None:
    tenure = acquire(files, HERE, at_once)
    assert tenure is not None
    now = time.monotonic()
    assert not tenure.due(now) and tenure.due(now + RENEW_S)
    before = tenure.lease
    tenure.renew()
    assert read_lease(files) == tenure.lease != before
    assert 3 * RENEW_S < LEASE_S


def test_within_a_cluster_one_attaches_and_the_controller_succeeds(files: Files) -> None:
    driver = acquire(files, HERE, at_once)
    assert driver is not None
    later = replace(HERE, pid=os.getppid(), process_start=_process_start(os.getppid()))
    assert acquire(files, later, at_once) is None
    controller = succeed(files, later, at_once)
    controller.renew(epoch=1)
    assert read_lease(files) == controller.lease == replace(controller.lease, tenure=2, epoch=1)
    with pytest.raises(LeaseLost, match=rf"lease\.json: process {later.pid} on host .* has taken it over"):
        driver.renew()
    with pytest.raises(LeaseLost):
        driver.release()
    assert read_lease(files) == controller.lease


def test_what_was_released_is_taken_at_once_from_anywhere(files: Files) -> None:
    first = acquire(files, AWAY, at_once)
    assert first is not None
    first.release()
    second = acquire(files, replace(HERE, cluster="cluster-c"), at_once)
    assert second is not None and second.reason.endswith("has ended")


def test_a_late_write_of_the_one_before_does_no_harm(files: Files) -> None:
    first = acquire(files, HERE, at_once)
    assert first is not None
    second = succeed(files, replace(HERE, pid=os.getppid()), at_once)
    files.replace(SHOWN, first.lease.to_json())
    assert read_lease(files) == replace(second.lease, renewed=second.lease.start)
    second.renew()
    assert json.loads(files.read(SHOWN) or b"")["tenure"] == 2


class _FailingOnce(LocalFiles):
    """The store fails after the lease was taken and before it is shown."""

    failed = False

    def replace(self, name: str, data: bytes) -> None:
        if not self.failed:
            self.failed = True
            raise StoreError("down")
        super().replace(name, data)


def test_one_who_asks_again_after_the_store_failed_has_it(tmp_path: Path) -> None:
    files = _FailingOnce(tmp_path)
    with pytest.raises(StoreError, match="down"):
        acquire(files, HERE, at_once)
    tenure = acquire(files, HERE, at_once)
    assert tenure is not None and tenure.lease.tenure == 1
    assert read_lease(files) == tenure.lease


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"format": 3}, "has format 3; this evenkeel reads up to 2"),
        ({"pid": "7"}, "int expected, not '7'"),
        ({"pid": None}, "int expected, not None"),
        ({"ray_pid": -2}, "one of which is that of no process"),
        ({"start": 1e300}, "no time of this age"),
        ({"start": "nan"}, "no time of this age"),
        ({"more": 1}, "no field 'more'"),
    ],
)
def test_what_cannot_be_read_is_refused_by_name(tmp_path: Path, change: dict[str, Any], said: str) -> None:
    files = LocalFiles(tmp_path)
    assert acquire(files, HERE, at_once)
    files.replace(SHOWN, json.dumps({**json.loads(files.read(SHOWN) or b""), **change}).encode())
    with pytest.raises(StoreError, match=re.escape(said)) as caught:
        acquire(files, HERE, at_once)
    assert str(caught.value).startswith(files.where(SHOWN))


def test_half_a_file_is_refused_by_name(tmp_path: Path) -> None:
    LocalFiles(tmp_path).replace(SHOWN, b'{"format": 1, "pi')
    with pytest.raises(StoreError, match=r"lease\.json: damaged .* remove it if nobody runs this run"):
        acquire(LocalFiles(tmp_path), HERE, at_once)


# ------------------------------------------------------------ how long


class _Slow(LocalFiles):
    """A store that takes its time, by a clock that stands still otherwise."""

    def __init__(self, root: Path, request_s: float) -> None:
        super().__init__(root)
        self.now, self.request_s = 1000.0, request_s

    def wait(self, seconds: float) -> bool:
        self.now += seconds
        return False

    def names(self, folder: str) -> list[str]:
        self.now += self.request_s
        return super().names(folder)

    def read(self, name: str, offset: int = 0) -> bytes | None:
        data = super().read(name, offset)
        self.now += self.request_s
        return data

    def create(self, name: str, data: bytes) -> bool:
        self.now += self.request_s
        return super().create(name, data)

    def replace(self, name: str, data: bytes) -> None:
        self.now += self.request_s
        super().replace(name, data)


@pytest.mark.parametrize("request_s", [0.0, 0.05, 0.1])
def test_an_unknown_holder_is_waited_for_15_seconds_at_most(tmp_path: Path, request_s: float) -> None:
    assert acquire(LocalFiles(tmp_path), AWAY, at_once)
    files = _Slow(tmp_path, request_s)
    tenure = acquire(files, replace(HERE, cluster="cluster-c"), files.wait, lambda: files.now)
    assert tenure is not None and tenure.reason.endswith("has not been heard of for 14 s")
    assert LEASE_S <= files.now - 1000 <= 15
    assert read_lease(LocalFiles(tmp_path)) == tenure.lease


def test_what_a_slow_store_answers_is_as_old_as_the_question(tmp_path: Path) -> None:
    """The last look begins before the lease may expire and ends after; the holder has renewed it meanwhile."""
    held = acquire(LocalFiles(tmp_path), AWAY, at_once)
    assert held is not None

    class Slow(_Slow):
        def read(self, name: str, offset: int = 0) -> bytes | None:
            data = super().read(name, offset)
            if name == SHOWN and self.now >= 1013:
                self.now += LEASE_S
                held.renew()
            return data

    files = Slow(tmp_path, 0.0)
    with pytest.raises(LeaseHeld, match="runs it in another cluster"):
        acquire(files, replace(HERE, cluster="cluster-c"), files.wait, lambda: files.now)
    assert read_lease(LocalFiles(tmp_path)) == held.lease
    held.renew()


def test_a_watch_counts_from_the_last_change(tmp_path: Path) -> None:
    files = _Slow(tmp_path, 0.0)
    held = acquire(files, AWAY, at_once)
    assert held is not None
    watch = Watch(files, lambda: files.now)
    files.now += 10
    watch.look()
    assert (watch.changed, watch.unchanged_s, watch.pause_s) == (False, 10.0, 0.5)
    held.renew()
    watch.look()
    assert (watch.lease, watch.changed, watch.unchanged_s) == (held.lease, True, 0.0)
    files.now += LEASE_S - 0.25
    watch.look()
    assert (watch.unchanged_s, watch.pause_s) == (LEASE_S - 0.25, 0.25)
    files.now += 1
    assert watch.pause_s == 0.0


# ------------------------------------------------------------ processes


@pytest.fixture(params=["local", "moto"])
def shared(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A root that processes share."""
    if request.param == "local":
        return str(tmp_path)
    request.getfixturevalue("moto_in_environment")
    return f"s3://{BUCKET}/{uuid.uuid4().hex}"


@contextmanager
def holding(root: str) -> Iterator[tuple[Lease, "Connection[Any, Any]"]]:
    ours, theirs = _context.Pipe()
    process = _context.Process(target=hold, args=(root, theirs))
    process.start()
    theirs.close()
    try:
        yield ours.recv(), ours
    finally:
        process.kill()
        process.join()


def renewed_again(pipe: "Connection[Any, Any]") -> None:
    """Returns after a renewal that began after this call."""
    while pipe.poll():
        pipe.recv()
    for _ in range(2):
        assert pipe.poll(PATIENCE_S) and pipe.recv() == "renewed"


def test_the_living_are_named(shared: str) -> None:
    with holding(shared) as (lease, pipe):
        renewed_again(pipe)
        with pytest.raises(LeaseHeld) as caught:
            acquire(open_files(shared), HERE, briefly)
    pid, host = lease.holder.pid, lease.holder.host
    said = f"{shared}: process {pid} on host {host}, started {lease.who[-23:]}, runs it in another cluster; stop that"
    assert str(caught.value).startswith(said)


def test_the_dead_of_this_host_give_way_at_once(shared: str) -> None:
    with holding(shared) as (lease, _):
        os.kill(lease.holder.pid, signal.SIGKILL)
        os.waitid(os.P_PID, lease.holder.pid, os.WEXITED | os.WNOWAIT)
        tenure = acquire(open_files(shared), HERE, at_once)
    assert tenure is not None and tenure.reason == f"{lease.who}, is dead"


def test_the_dead_of_another_host_are_waited_for(shared: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease_module, "LEASE_S", 1.0)
    with holding(shared) as (lease, _):
        os.kill(lease.holder.pid, signal.SIGKILL)
    waits: list[float] = []

    def wait(seconds: float) -> bool:
        waits.append(seconds)
        return briefly(seconds)

    begun = time.monotonic()
    tenure = acquire(open_files(shared), AWAY, wait)
    assert tenure is not None and tenure.reason == f"{lease.who}, has not been heard of for 1 s"
    assert waits and time.monotonic() - begun >= 1.0


def test_one_that_was_stopped_finds_that_it_has_lost(shared: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease_module, "LEASE_S", 1.0)
    with holding(shared) as (lease, pipe):
        os.kill(lease.holder.pid, signal.SIGSTOP)
        tenure = acquire(open_files(shared), HERE, briefly)
        assert tenure is not None
        os.kill(lease.holder.pid, signal.SIGCONT)
        while (said := pipe.recv()) == "renewed":
            pass
        assert said.endswith(f"{tenure.lease.who}, has taken it over")
        tenure.renew()
        assert read_lease(open_files(shared)) == tenure.lease


def test_waiting_can_be_stopped(tmp_path: Path) -> None:
    files = LocalFiles(tmp_path)
    assert acquire(files, AWAY, at_once)
    stop = threading.Event()
    stop.set()
    with pytest.raises(LeaseHeld, match="may be alive; stop that one first"):
        acquire(files, replace(HERE, cluster="cluster-c"), stop.wait)


def test_of_two_takers_at_once_one_has_it(shared: str) -> None:
    dead = lease_of(replace(HERE, cluster="cluster-0", pid=HERE.pid, process_start=HERE.process_start + 1))
    for i in range(0, ROUNDS, 2):  # in the others there is none to be taken over
        open_files(f"{shared}/{i}").create(f"{FOLDER}/000001.json", dead.to_json())
    barriers = _context.Barrier(2), _context.Barrier(2)
    pipes, processes = [], []
    for cluster in ("cluster-a", "cluster-b"):
        ours, theirs = _context.Pipe()
        processes.append(_context.Process(target=race, args=(shared, cluster, *barriers, theirs)))
        processes[-1].start()
        theirs.close()
        pipes.append(ours)
    try:
        rounds = [[pipe.recv() for pipe in pipes] for _ in range(ROUNDS)]
    finally:
        for process in processes:
            process.join(PATIENCE_S)
            process.kill()
    for i, results in enumerate(rounds):
        (winner,) = (r for r in results if isinstance(r, Lease))
        (loser,) = (r for r in results if isinstance(r, str))
        assert f"process {winner.holder.pid} on host" in loser
        assert winner.tenure == (1 if i % 2 else 2)
        assert read_lease(open_files(f"{shared}/{i}")) == winner
