"""Whole files: seen old or new, never half; failures are one line with the path."""

import errno
import os
import pickle
import resource
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import fsspec
import pytest
from disks import small_disk
from fsspec.implementations.memory import MemoryFileSystem
from fsspec.spec import AbstractBufferedFile

from evenkeel.store import failures
from evenkeel.store.errors import StoreError
from evenkeel.store.failures import transient
from evenkeel.store.files import Files, LocalFiles, ObjectFiles, open_files

pytestmark = pytest.mark.stores("moto", "rgw")


def test_read_replace_remove(files: Files) -> None:
    assert files.read("a/b.json") is None
    files.replace("a/b.json", b"one")
    files.replace("a/b.json", b"second")
    assert files.read("a/b.json") == b"second"
    assert files.read("a/b.json", offset=3) == b"ond"
    files.remove("a/b.json")
    files.remove("a/b.json")
    assert files.read("a/b.json") is None


def test_create_only_if_absent(files: Files) -> None:
    assert files.create("j/1", b"mine")
    assert not files.create("j/1", b"yours")
    assert files.create("j/1", b"mine"), "equal bytes are one's own success, told twice"
    assert files.read("j/1") == b"mine"


def test_names_are_sorted_files_only(files: Files) -> None:
    assert files.names("j") == []
    for name in ("j/2", "j/10", "j/1", "j/deeper/3"):
        files.replace(name, b"x")
    assert files.names("j") == ["1", "10", "2"]


def test_of_many_writers_at_once_one_creates(files: Files) -> None:
    barrier, winners = threading.Barrier(8), []

    def race(i: int) -> None:
        barrier.wait()
        if files.create("entry", f"writer {i}".encode()):
            winners.append(i)

    threads = [threading.Thread(target=race, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(winners) == 1
    assert files.read("entry") == f"writer {winners[0]}".encode()


def test_a_file_gives_way_only_to_whoever_has_just_seen_it(files: Files) -> None:
    assert files.replace_if("n", b"1", lambda: True), "there is none"
    assert not files.replace_if("n", b"2", lambda: False)
    assert files.read("n") == b"1"
    assert files.replace_if("n", b"3", lambda: files.read("n") == b"1")
    assert files.read("n") == b"3"


def test_of_many_who_replace_a_file_none_undoes_what_another_did(files: Files, store: str) -> None:
    if store == "memory":
        pytest.skip("it knows no condition but that there is no such file: see Files.replace_if")
    files.create("count", b"0")

    def count() -> None:
        counted = 0
        while counted < 4:
            now = files.read("count")
            counted += files.replace_if("count", b"%d" % (int(now or 0) + 1), lambda: files.read("count") == now)  # noqa: B023

    threads = [threading.Thread(target=count) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert files.read("count") == b"16"
    if isinstance(files, LocalFiles):
        assert os.listdir(files.root) == ["count"], "a lock leaves nothing behind"


def test_a_stream_appears_whole_or_not_at_all(url: str) -> None:
    files = open_files(url)
    with files.stream("s") as sink:
        sink.write(b"ab")
        sink.write(memoryview(b"cd"))
        if isinstance(files, LocalFiles):
            assert files.read("s") is None
    assert files.read("s") == b"abcd"
    with suppress(KeyboardInterrupt), files.stream("s") as sink:
        sink.write(b"half")
        raise KeyboardInterrupt
    if isinstance(files, LocalFiles):
        assert files.read("s") == b"abcd"
        assert os.listdir(files.root) == ["s"], "no temporary file is left"


def test_unfinished_files_are_not_listed(tmp_path: Path) -> None:
    files = LocalFiles(tmp_path)
    with files.stream("folder/x") as sink:
        sink.write(b"1")
        assert len(os.listdir(tmp_path / "folder")) == 1
        assert files.names("folder") == []


def test_a_broken_stream_to_an_object_store_is_discarded(tmp_path: Path) -> None:
    discarded: list[bool] = []

    class Upload(AbstractBufferedFile):  # type: ignore[misc]
        def __init__(self) -> None:
            self.closed = False

        def write(self, data: bytes) -> None:
            raise ConnectionError("reset")

        def discard(self) -> None:
            discarded.append(True)

        def close(self) -> None:
            raise AssertionError("closing commits")

    class Store(MemoryFileSystem):  # type: ignore[misc]
        cachable = False

        def open(self, path: str, mode: str = "rb", **kwargs: Any) -> Any:
            return Upload()

    files = ObjectFiles(Store(), "/x", "memory://x")
    with pytest.raises(StoreError, match=r"memory://x/s: reset"), files.stream("s") as sink:
        sink.write(b"1")
    assert discarded == [True]


@pytest.fixture(params=["disk", "limit"])
def full(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """A folder on a disk of 1 MiB; or one where no file may be larger."""
    if request.param == "limit":
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, hard))
        yield tmp_path
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        return
    with small_disk(tmp_path, 1024):
        yield tmp_path


def test_a_full_disk_leaves_old_files_whole_and_new_ones_absent(full: Path) -> None:
    files = LocalFiles(full)
    files.replace("run.json", b"old")

    def upload() -> None:
        with files.stream("c/part") as sink:
            for _ in range(32):
                sink.write(bytes(1 << 16))

    calls: list[Callable[[], object]] = [
        upload,
        lambda: files.replace("run.json", bytes(2 << 20)),
        lambda: files.create("entry", bytes(2 << 20)),
    ]
    said = r": (No space left on device; free some|File too large; raise the limit \(ulimit -f\)), or use another run"
    for call in calls:
        with pytest.raises(StoreError, match=said) as caught:
            call()
        assert not transient(caught.value)
    assert [p for p in full.rglob("*") if p.is_file()] == [full / "run.json"]
    assert files.read("run.json") == b"old"
    assert files.create("entry", b"there was room again")


def test_what_killed_writers_left_is_removed(files: Files) -> None:
    files.replace("c/deep/a", b"1")
    if isinstance(files, LocalFiles):
        (files.root / "c" / "deep" / ".b.tmp-0123").write_bytes(b"half")
    assert files.drop_unfinished("c") == isinstance(files, LocalFiles)
    assert files.drop_unfinished("") == 0
    assert files.read("c/deep/a") == b"1"
    if isinstance(files, LocalFiles):
        assert os.listdir(files.root / "c" / "deep") == ["a"]


@pytest.mark.parametrize("method", ["read", "replace", "create", "remove", "names", "stream"])
def test_a_path_under_a_regular_file_is_told(tmp_path: Path, method: str) -> None:
    (tmp_path / "plain").write_text("")
    files = open_files(str(tmp_path / "plain" / "root"))
    calls: dict[str, Callable[[], object]] = {
        "read": lambda: files.read("f"),
        "replace": lambda: files.replace("f", b""),
        "create": lambda: files.create("f", b""),
        "remove": lambda: files.remove("f"),
        "names": lambda: files.names("f"),
        "stream": lambda: files.stream("f").__enter__(),
    }
    with pytest.raises(StoreError, match="Not a directory") as caught:
        calls[method]()
    assert len(str(caught.value).splitlines()) == 1
    assert str(tmp_path / "plain" / "root" / "f") in str(caught.value)


class _Unclear(MemoryFileSystem):  # type: ignore[misc]
    """An object store whose conditional PUT ends in an error after, or instead of, storing."""

    cachable = False
    protocol = "unclear"
    stores = True

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **kwargs: Any) -> None:
        if self.stores:
            super().pipe_file(path, value, mode, **kwargs)
        raise OSError(22, "Invalid argument")


def test_after_an_unclear_refusal_the_file_tells(tmp_path: Path) -> None:
    fs = _Unclear()
    files = ObjectFiles(fs, f"/{tmp_path.name}", "unclear://x")
    assert files.create("e", b"mine"), "the reply was lost, the entry is there"
    assert not files.create("e", b"yours")
    fs.stores = False
    with pytest.raises(StoreError, match="unclear://x/f: Invalid argument"):
        files.create("f", b"mine")


HUSH = "hush-9f3c57e1a2"


class _Telltale(MemoryFileSystem):  # type: ignore[misc]
    """An object store that fails, and says in its errors what is nobody's business."""

    cachable = False
    protocol = "telltale"
    reading: Exception = OSError(errno.EIO, "Input/output error")
    writing: Exception = OSError(errno.EIO, "Input/output error")

    def cat_file(self, *args: Any, **kwargs: Any) -> bytes:
        raise self.reading

    def pipe_file(self, *args: Any, **kwargs: Any) -> None:
        raise self.writing


@pytest.mark.parametrize(
    ("error", "passes", "is_full"),
    [
        (ConnectionRefusedError(errno.ECONNREFUSED, f"as {HUSH}"), True, False),
        (OSError(errno.ENOSPC, f"for {HUSH}"), False, True),
        (PermissionError(errno.EACCES, f"to {HUSH}"), False, False),
    ],
)
def test_what_passes_is_known_of_errors_that_cannot_be_shown(error: Exception, passes: bool, is_full: bool) -> None:
    fs = _Telltale()
    fs.reading = error
    with pytest.raises(StoreError) as caught:
        ObjectFiles(fs, "/b", "telltale://b", [HUSH]).read("f")
    for seen in (caught.value, pickle.loads(pickle.dumps(caught.value))):  # as it comes from another process
        assert (transient(seen), failures.full(seen)) == (passes, is_full)
    assert HUSH not in "".join(traceback.format_exception(caught.value))
    later = StoreError("given up")
    later.__cause__ = caught.value
    assert (transient(later), failures.full(later)) == (passes, is_full)


def test_what_was_being_handled_when_an_error_came_up_is_not_shown_either() -> None:
    """`create` reads back after a failure, and a traceback tells of both."""
    fs = _Telltale()
    fs.writing, fs.reading = OSError(errno.EIO, f"as {HUSH}"), ConnectionResetError(errno.ECONNRESET, "reset")
    with pytest.raises(StoreError, match="telltale://b/f: reset") as caught:
        ObjectFiles(fs, "/b", "telltale://b", [HUSH]).create("f", b"")
    assert transient(caught.value)
    assert HUSH not in "".join(traceback.format_exception(caught.value))


def test_a_store_that_cannot_create_exclusively_is_refused() -> None:
    class Plain(fsspec.AbstractFileSystem):  # type: ignore[misc]
        protocol = "plain"
        cachable = False

    with pytest.raises(StoreError, match="plain cannot create a file only if absent"):
        ObjectFiles(Plain(), "/x", "plain://x").create("f", b"")


def test_a_file_system_without_hard_links_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def link(source: Path, target: Path) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", link)
    with pytest.raises(StoreError, match="no hard links"):
        LocalFiles(tmp_path).create("f", b"")
    assert os.listdir(tmp_path) == []


def test_a_missing_file_system_is_told_without_credentials() -> None:
    with pytest.raises(StoreError, match="nosuch://bucket/x: Protocol not known") as caught:
        open_files("nosuch://key:hush@bucket/x")
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("url", "where"),
    [
        ("memory://key:hush@b", "memory://b/f"),
        ("memory://key:hush/hush@b/c@d/", "memory://d/f"),
        ("memory://b/c@d", "memory://b/c@d/f"),
        ("memory://b?token=hush", "memory://b?token=***/f"),
    ],
)
def test_the_whereabouts_of_an_object_store_hold_no_credentials(url: str, where: str) -> None:
    assert ObjectFiles(MemoryFileSystem(), "/b", url).where("f") == where
