"""A cluster that is named but cannot be joined is bad input: one line, status 2, and nothing is left."""

import socket
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from ray_runs import Site

from evenkeel.runtime.cluster import Need, NoClusterError, ray_for

NOBODY = "127.0.0.1:1"


@pytest.fixture
def silent() -> Iterator[str]:
    """Where somebody listens who is no Ray cluster."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"127.0.0.1:{server.getsockname()[1]}"


def test_nobody_listens_there(tmp_path: Path) -> None:
    done = Site(tmp_path, NOBODY).run({})
    assert (done.status, done.out) == (2, "")
    assert done.err == (
        f"evenkeel: RAY_ADDRESS: no cluster answers at {NOBODY!r}; name another one, or 'local' to train on this "
        "machine\n"
    )
    assert not done.directory.exists()


def refusal(monkeypatch: pytest.MonkeyPatch, address: str) -> str:
    monkeypatch.setenv("RAY_ADDRESS", address)
    monkeypatch.setenv("RAY_USE_TLS", "0")
    monkeypatch.delitem(sys.modules, "ray", raising=False)  # else the one that other tests share would be taken
    monkeypatch.setattr("evenkeel.runtime.cluster.ANSWER_S", 0.2)
    with pytest.raises(NoClusterError) as raised, ray_for(Need(1, {"CPU": 1.0}), {}):
        pass
    return str(raised.value)


def test_somebody_else_listens_there(silent: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert refusal(monkeypatch, silent).startswith(f"no cluster answers at {silent!r}; ")


@pytest.mark.parametrize("address", ["ray://127.0.0.1:10001", "nonsense"])
def test_no_address_of_a_cluster(monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    assert repr(address) in refusal(monkeypatch, address)
