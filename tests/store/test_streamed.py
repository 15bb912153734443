"""A large file on a disk: its bytes go there while they come, so that little is left to wait for at the end."""

import ctypes
import errno
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from children import DATA, upload

from evenkeel.store import local
from evenkeel.store.errors import StoreError
from evenkeel.store.files import LocalFiles

WINDOW = 1 << 20
CACHESTAT = 451
BEGIN, FINISH = 2, 7


class Told:
    """Which ranges were sent to the disk, and how; it does as it is told, or answers with an error.

    Attributes:
        ranges: start, stop and flags of each call.
        syncs: calls of os.fdatasync.
        answers: the errno by the flags; 0 where it really does it.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.ranges: list[tuple[int, int, int]] = []
        self.syncs = 0
        self.answers = {BEGIN: 0, FINISH: 0}
        self._really, self._really_sync = local._sync_range, os.fdatasync
        monkeypatch.setattr(local, "_sync_range", self._sync_range)
        monkeypatch.setattr(os, "fdatasync", self._fdatasync)

    def _sync_range(self, fd: int, start: int, stop: int, flags: int) -> int:
        self.ranges.append((start, stop, flags))
        return self.answers[flags] or self._really(fd, start, stop, flags)

    def _fdatasync(self, fd: int) -> None:
        self.syncs += 1
        self._really_sync(fd)


@pytest.fixture
def small_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local, "WINDOW_BYTES", WINDOW)


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch, small_windows: None) -> Told:
    return Told(monkeypatch)


def not_on_disk(path: Path) -> int:
    """Bytes of a file that are only in memory, or on their way; skips where the system does not say."""
    whole, found = (ctypes.c_uint64 * 2)(0, 0), ctypes.create_string_buffer(5 * 8)
    with path.open("rb") as file:
        if ctypes.CDLL(None, use_errno=True).syscall(CACHESTAT, file.fileno(), whole, found, 0):
            pytest.skip(f"cachestat: {os.strerror(ctypes.get_errno())}")
    _, dirty, under_way, _, _ = struct.unpack("5Q", found.raw)
    return int(dirty + under_way) * os.sysconf("SC_PAGE_SIZE")


def test_little_of_a_long_file_is_not_on_the_disk_yet(tmp_path: Path, small_windows: None) -> None:
    most = 0
    with LocalFiles(tmp_path).stream("part") as sink:
        (path,) = tmp_path.iterdir()
        for _ in range(512):
            sink.write(os.urandom(WINDOW // 16))
            most = max(most, not_on_disk(path))
        assert most <= 2 * WINDOW
    assert not_on_disk(tmp_path / "part") == 0
    assert (tmp_path / "part").stat().st_size == 32 * WINDOW


def test_each_window_is_begun_when_it_is_full_and_waited_for_at_the_next(tmp_path: Path, told: Told) -> None:
    head, piece = 100, WINDOW // 2
    files = LocalFiles(tmp_path)
    with files.stream("part") as sink:
        for data in (DATA[:head], *(DATA[at : at + piece] for at in range(head, head + 4 * WINDOW, piece))):
            sink.write(data)
        assert told.ranges == [
            (0, WINDOW, BEGIN),
            (WINDOW, 2 * WINDOW, BEGIN),
            (0, WINDOW, FINISH),
            (2 * WINDOW, 3 * WINDOW, BEGIN),
            (WINDOW, 2 * WINDOW, FINISH),
            (3 * WINDOW, 4 * WINDOW, BEGIN),
            (2 * WINDOW, 3 * WINDOW, FINISH),
        ]
    assert told.syncs == 0
    assert files.read("part") == DATA[: head + 4 * WINDOW]


def test_one_write_of_many_windows_is_one(tmp_path: Path, told: Told) -> None:
    files = LocalFiles(tmp_path)
    with files.stream("part") as sink:
        sink.write(b"head")
        sink.write(memoryview(DATA)[4:])
    whole = len(DATA) // WINDOW * WINDOW
    assert told.ranges == [(0, whole, BEGIN)]
    assert files.read("part") == b"head" + DATA[4:]


def test_nothing_of_this_is_done_for_small_files(tmp_path: Path, told: Told) -> None:
    files = LocalFiles(tmp_path)
    files.replace("a", DATA[: WINDOW - 1])
    files.create("b", DATA)
    with files.stream("c") as sink:
        for at in range(0, WINDOW - 4096, 4096):
            sink.write(DATA[at : at + 4096])
    assert told.ranges == [] and told.syncs == 0


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.EINVAL, errno.ESPIPE, errno.EOPNOTSUPP, errno.EPERM])
def test_where_the_system_cannot_be_told_each_window_is_synced(tmp_path: Path, told: Told, number: int) -> None:
    told.answers = {BEGIN: number, FINISH: number}
    files = LocalFiles(tmp_path)
    upload(files, "c/part")
    assert files.read("c/part") == DATA
    assert told.syncs == len(DATA) // WINDOW
    assert {flags for _, _, flags in told.ranges} == {BEGIN}, "nothing is waited for that was not begun"


def test_a_library_without_the_call_is_one_more_such_system(
    tmp_path: Path, told: Told, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda *_, **__: object())
    files = LocalFiles(tmp_path)
    upload(files, "c/part")
    assert files.read("c/part") == DATA
    assert told.syncs == len(DATA) // WINDOW


def test_what_the_system_answers_is_an_errno() -> None:
    reader, writer = os.pipe()
    try:
        assert local._sync_range(writer, 0, 1, BEGIN) == errno.ESPIPE
    finally:
        os.close(reader)
        os.close(writer)
    assert local._sync_range(writer, 0, 1, BEGIN) == errno.EBADF


def at_the_wait(told: Told, monkeypatch: pytest.MonkeyPatch) -> None:
    told.answers[FINISH] = errno.EIO


def at_the_begin(told: Told, monkeypatch: pytest.MonkeyPatch) -> None:
    told.answers[BEGIN] = errno.EIO
    monkeypatch.setattr(os, "fdatasync", broken)


def broken(fd: int) -> None:
    raise OSError(errno.EIO, os.strerror(errno.EIO))


@pytest.mark.parametrize("fail", [at_the_wait, at_the_begin])
def test_what_the_disk_could_not_write_is_told_and_nothing_is_left(
    tmp_path: Path, told: Told, monkeypatch: pytest.MonkeyPatch, fail: Callable[..., Any]
) -> None:
    fail(told, monkeypatch)
    files = LocalFiles(tmp_path)
    with pytest.raises(StoreError, match=r"/c/part: Input/output error$"):
        upload(files, "c/part")
    assert os.listdir(tmp_path / "c") == []
