"""Which Ray is used, and whether it could ever hold the run; decided without starting one."""

import os
import socket
from pathlib import Path

import pytest

from evenkeel.runtime.cluster import Need, NotEnoughError, check_need, given_address, ray_for


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


def test_a_cluster_of_this_machine_is_found_while_it_answers(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:  # it answers from its backlog
        address = f"127.0.0.1:{server.getsockname()[1]}"
        left_behind(tmp_path, address)
        assert given_address() == address
    assert given_address() is None


def test_what_is_missing_is_named_with_what_is_there() -> None:
    check_need(Need(4, {"CPU": 1.0}), {"CPU": 4.0}, "the cluster")
    with pytest.raises(NotEnoughError) as caught:
        check_need(Need(5, {"CPU": 1.0}), {"CPU": 4.0, "GPU": 2.0, "memory": 1e9, "node:x": 1.0}, "the cluster")
    assert str(caught.value) == "5 workers (spares included) need 5 CPU, but the cluster has at most 4 CPU, 2 GPU"


def test_a_local_ray_cannot_have_custom_resources() -> None:
    before = dict(os.environ)
    slots = Need(1, {"slot": 1.0})
    with pytest.raises(NotEnoughError, match=r"resources_per_worker\.slot"), ray_for(slots, {"A": "b"}):
        pass
    assert os.environ.get("A") is None
    assert {k: v for k, v in os.environ.items() if k != "RAY_USAGE_STATS_ENABLED"} == {
        k: v for k, v in before.items() if k != "RAY_USAGE_STATS_ENABLED"
    }
