"""Which Ray is used, and whether it could ever hold the run; decided without starting one."""

import json
import os
import socket
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from evenkeel.runtime.cluster import (
    MOST_LEFTOVERS,
    Need,
    NotEnoughError,
    check_need,
    given_address,
    ray_for,
    remove_leftovers,
    shortage,
)
from evenkeel.store.lease import Holder


@pytest.fixture(autouse=True)
def no_cluster(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))


def left_behind(tmp_path: Path, address: str) -> None:
    """As `ray start` leaves it."""
    (tmp_path / "ray").mkdir()
    (tmp_path / "ray" / "ray_current_cluster").write_text(address)


def test_no_cluster_is_given() -> None:
    assert given_address() is None


def test_the_environment_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    assert given_address() == "10.0.0.1:6379"
    monkeypatch.setenv("RAY_ADDRESS", "local")
    assert given_address() is None


def test_a_cluster_of_this_machine_is_found_while_it_answers(shared_ray: str, tmp_path: Path) -> None:
    left_behind(tmp_path, shared_ray)
    assert given_address() == shared_ray


def test_what_answers_in_its_place_is_no_cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("evenkeel.runtime.cluster.ANSWER_S", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as server:  # it answers from its backlog, and says nothing
        left_behind(tmp_path, f"127.0.0.1:{server.getsockname()[1]}")
        assert given_address() is None
    assert given_address() is None


def test_what_is_missing_is_named_with_what_is_there() -> None:
    check_need(Need(4, {"CPU": 1.0}), {"CPU": 4.0}, None, "the cluster")
    with pytest.raises(NotEnoughError) as caught:
        check_need(Need(5, {"CPU": 1.0}), {"CPU": 4.0, "GPU": 2.0, "memory": 1e9, "node:x": 1.0}, None, "the cluster")
    assert str(caught.value) == "5 workers (spares included) need 5 CPU, but the cluster has at most 4 CPU, 2 GPU"


@pytest.mark.parametrize(
    ("each", "node", "room"),
    [
        ({"CPU": 0.8}, {"CPU": 2.0}, 2),
        ({"CPU": 0.8}, {"CPU": 3.0}, 3),
        ({"CPU": 0.1}, {"CPU": 1.0}, 10),
        ({"CPU": 2.0, "GPU": 0.5}, {"CPU": 8.0, "GPU": 1.0}, 2),
        ({"GPU": 0.6}, {"GPU": 2.0}, 2),  # a part of a GPU is of one
        ({"GPU": 2.0}, {"GPU": 5.0}, 2),
        ({"CPU": 0.0}, {}, 20),
        ({"slot": 1.0}, {"CPU": 1.0}, 0),
    ],
)
def test_how_many_workers_a_node_has_room_for(each: dict[str, float], node: dict[str, float], room: int) -> None:
    assert Need(20, each).fits(node) == room


def test_workers_that_would_have_to_be_spread_over_nodes_do_not_fit() -> None:
    need, nodes = Need(4, {"CPU": 1.5}), [{"CPU": 4.0}, {"CPU": 2.0}]
    check_need(Need(3, need.each), {"CPU": 6.0}, nodes, "the cluster")
    check_need(need, {"CPU": 6.0}, None, "the cluster")  # of an autoscaler's nodes the sizes are not known
    with pytest.raises(NotEnoughError) as caught:
        check_need(need, {"CPU": 6.0}, nodes, "the cluster")
    expected = "need 1.5 CPU each on one node, but the nodes of the cluster have room for 3"
    assert str(caught.value) == f"4 workers (spares included) {expected}"


def test_a_run_that_has_begun_goes_on_with_what_is_left() -> None:
    """And is told so; one that begins is refused, and so is one for which not even the fewest workers are left."""
    need, two = Need(5, {"CPU": 1.0}, fewest=2), [{"CPU": 1.0}, {"CPU": 1.0}]
    short = "5 workers (spares included) need 5 CPU, but the cluster has at most 2 CPU"
    assert shortage(need, True, {"CPU": 2.0}, two, "the cluster") == short
    with pytest.raises(NotEnoughError) as caught:
        shortage(need, False, {"CPU": 2.0}, two, "the cluster")
    assert str(caught.value) == short
    with pytest.raises(NotEnoughError) as caught:
        shortage(need, True, {"CPU": 1.0}, two[:1], "the cluster")
    assert str(caught.value) == "2 workers (the fewest that train) need 2 CPU, but the cluster has at most 1 CPU"
    with pytest.raises(NotEnoughError, match=r"2 workers \(the fewest that train\) .* have room for 0"):
        shortage(Need(5, {"CPU": 1.5}, fewest=2), True, {"CPU": 4.0}, [{"CPU": 1.0}] * 4, "the cluster")
    assert shortage(need, False, {"CPU": 5.0}, None, "the cluster") == ""


def owned(folder: Path, owner: Holder | None) -> Path:
    """A folder as a local Ray has it."""
    folder.mkdir()
    (folder / "session").mkdir()
    if owner is not None:
        (folder / "owner.json").write_text(json.dumps(asdict(owner)))
    return folder


def test_what_local_rays_of_killed_processes_left_is_removed(tmp_path: Path) -> None:
    with subprocess.Popen(["sleep", "60"]) as process:
        me = Holder.this("")
        ticks = int(Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[19])
        owner = replace(me, pid=process.pid, process_start=ticks)
        dead = [owned(tmp_path / f"evenkeel-{n}", owner) for n in range(MOST_LEFTOVERS + 1)]
        kept = [
            owned(tmp_path / "evenkeel-mine", me),
            owned(tmp_path / "evenkeel-elsewhere", replace(owner, host="elsewhere")),
            owned(tmp_path / "evenkeel-new", None),
            owned(tmp_path / "other", owner),
        ]
        remove_leftovers(tmp_path)
        assert all(path.exists() for path in [*dead, *kept])
        process.kill()
    remove_leftovers(tmp_path)
    assert len([path for path in dead if path.exists()]) == 1  # the rest is the next start's
    remove_leftovers(tmp_path)
    assert sorted(tmp_path.iterdir()) == sorted(kept)


def test_a_local_ray_cannot_have_custom_resources(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "ray", raising=False)  # else the one that other tests share would be asked
    before = dict(os.environ)
    slots = Need(1, {"slot": 1.0})
    with pytest.raises(NotEnoughError, match=r"resources_per_worker\.slot"), ray_for(slots, {"A": "b"}):
        pass
    assert os.environ.get("A") is None
    assert {k: v for k, v in os.environ.items() if k != "RAY_USAGE_STATS_ENABLED"} == {
        k: v for k, v in before.items() if k != "RAY_USAGE_STATS_ENABLED"
    }
