"""A cluster that is named but cannot be joined is bad input: one line, status 2, and nothing is left."""

import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from ray_runs import Site


@pytest.fixture
def port() -> Iterator[int]:
    """Where somebody listens who is no Ray cluster and says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


def refusal(tmp_path: Path, address: str) -> str:
    site = Site(tmp_path, address)
    done = site.run({})
    assert (done.status, done.out) == (2, "")
    assert done.err.startswith("evenkeel: RAY_ADDRESS: ") and done.err.count("\n") == 1
    assert not done.directory.exists()
    return done.err


def test_nobody_listens_there(tmp_path: Path) -> None:
    assert "no cluster answers at '127.0.0.1:1'; name another one, or 'local'" in refusal(tmp_path, "127.0.0.1:1")


def test_somebody_else_listens_there(tmp_path: Path, port: int) -> None:
    assert f"no cluster answers at '127.0.0.1:{port}'" in refusal(tmp_path, f"127.0.0.1:{port}")


@pytest.mark.parametrize("address", ["ray://127.0.0.1:10001", "nonsense"])
def test_no_address_of_a_cluster(tmp_path: Path, address: str) -> None:
    assert repr(address) in refusal(tmp_path, address)
