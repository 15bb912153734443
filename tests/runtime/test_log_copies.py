"""A worker's log on an object store: what is published while the store fails is there later."""

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from stores import BUCKET, Moto, Proxy, options

from evenkeel.runtime.logs import CopiedLog
from evenkeel.store.files import Files
from evenkeel.store.run_directory import RunDirectory


@pytest.fixture(scope="module")
def moto(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Moto]:
    server = Moto(tmp_path_factory.mktemp("moto"))
    yield server
    server.stop()


@pytest.fixture
def link(moto: Moto) -> Iterator[Proxy]:
    proxy = Proxy(moto.s3.port)
    yield proxy
    proxy.close()


@pytest.fixture
def files(link: Proxy) -> Files:
    return RunDirectory.at(f"s3://{BUCKET}/run", options(link)).files


def test_a_log_is_copied_whole_each_time(tmp_path: Path, files: Files) -> None:
    path = tmp_path / "w1.log"
    copied = CopiedLog(path, files, "logs/w1.log")
    for text in (b"one\n", b"one\ntwo\n"):
        path.write_bytes(text)
        copied.copy()
        assert files.read("logs/w1.log") == text


def test_a_store_that_fails_does_not_hold_up_who_publishes_and_has_the_log_later(
    tmp_path: Path, files: Files, link: Proxy, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "w1.log"
    path.write_bytes(b"Traceback\n")
    copied = CopiedLog(path, files, "logs/w1.log")
    link.cut()
    copied.copy()
    assert "will be tried again" in caplog.text
    link.mend()
    while files.read("logs/w1.log") != b"Traceback\n":
        time.sleep(0.1)
