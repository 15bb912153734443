"""A controller whose link fails while another takes its run, and one whose key may do less than it asks for."""

import os
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from checkpoint_state import checkpoints, commit, make_state, save, write_parts
from proxy import Proxy
from servers import S3, options

from evenkeel.core.ids import Version
from evenkeel.store.errors import JournalFenced, StoreError
from evenkeel.store.files import Files, open_files
from evenkeel.store.journal import Journal
from evenkeel.store.lease import Holder, LeaseLost, Tenure, acquire, succeed
from evenkeel.store.retry import Trouble
from evenkeel.store.run_directory import RunDirectory

STATE = make_state(0)
MANIFEST = rb"PUT .*manifest\.json"
REMOVAL = rb"DELETE .*manifest\.json"
LISTING = rb"GET .*[?&]uploads\b"
SLOW = "503 Slow Down", "SlowDown"
HERE = Holder.this("cluster-a")


@pytest.fixture
def direct(moto: S3, root: str) -> Files:
    return open_files(root, options(moto))


def at_once(_: float) -> bool:
    return False


def take_the_lease(files: Files) -> None:
    succeed(files, replace(HERE, cluster="cluster-a", pid=os.getppid()), at_once)


def write_the_journal(files: Files) -> None:
    journal = Journal(files)
    journal.read_all()
    journal.append(2, [{"n": 2}])


TAKEN: list[tuple[Callable[[Files], None], type[StoreError]]] = [
    (take_the_lease, LeaseLost),
    (write_the_journal, JournalFenced),
]


def begun(files: Files) -> tuple[Tenure, Journal]:
    tenure, journal = acquire(files, HERE, at_once), Journal(files)
    assert tenure is not None
    journal.append(1, [{"n": 1}])
    return tenure, journal


def held(files: Files, report: Callable[[Trouble], None]) -> Files:
    """What a controller completes its checkpoints with."""
    tenure, journal = begun(files)

    def fence() -> None:
        tenure.check()
        journal.check()

    return RunDirectory(files).fenced(fence).patient(report, threading.Event().wait).files


def superseded(take: Callable[[Files], None], link: Proxy, linked: Files, direct: Files) -> Files:
    """As `held`; when a request is refused for the first time, somebody else takes the run, and the link is healed."""

    def report(_: Trouble) -> None:
        if link.refused:
            take(direct)
            link.heal()

    return held(linked, report)


@pytest.mark.parametrize(("take", "error"), TAKEN)
def test_who_has_lost_the_run_completes_no_checkpoint(
    take: Callable[[Files], None], error: type[StoreError], link: Proxy, linked: Files, direct: Files
) -> None:
    """The run goes on from 20 elsewhere when the request for 30's manifest is sent again at last."""
    files = superseded(take, link, linked, direct)
    save(direct, STATE, 20)
    parts = write_parts(direct, Version(30, 1), STATE)
    link.refuse(MANIFEST, *SLOW)
    with pytest.raises(error):
        commit(files, Version(30, 1), STATE, parts)
    good, damaged = checkpoints(direct).newest_first()
    assert [found.manifest.version for found in good] == [Version(20, 1)] and not damaged


@pytest.mark.parametrize(("take", "error"), TAKEN)
def test_who_has_lost_the_run_removes_no_checkpoint(
    take: Callable[[Files], None], error: type[StoreError], link: Proxy, linked: Files, direct: Files
) -> None:
    files, gone = superseded(take, link, linked, direct), list[int]()
    for step in (20, 30):
        save(direct, STATE, step)
    link.refuse(REMOVAL, *SLOW)
    with pytest.raises(error):
        checkpoints(files).prune(keep=1, gone=gone.append)
    good, _ = checkpoints(direct).newest_first()
    assert [found.manifest.version.step for found in good] == [30, 20] and not gone


def test_who_holds_the_run_goes_on_when_the_store_is_back(link: Proxy, linked: Files, direct: Files) -> None:
    told: list[Trouble] = []

    def report(trouble: Trouble) -> None:
        told.append(trouble)
        link.heal()

    files = held(linked, report)
    save(direct, STATE, 20)
    parts = write_parts(direct, Version(30, 1), STATE)
    link.refuse(MANIFEST, *SLOW)
    commit(files, Version(30, 1), STATE, parts)
    link.refuse(REMOVAL, *SLOW)
    assert checkpoints(files).prune(keep=1) == [20]
    assert len(told) == 2 and checkpoints(direct).steps() == [30]


def test_nothing_but_looking_is_done_without_the_fence(tmp_path: Path) -> None:
    class LostError(StoreError):
        pass

    def fence() -> None:
        raise LostError("to another")

    open_files(str(tmp_path)).replace("c/a", b"1")
    files = RunDirectory.at(str(tmp_path)).fenced(fence).files
    assert files.read("c/a") == b"1" and files.names("c") == ["a"] and files.folders("") == ["c"]
    assert files.sizes("c") == {"a": 1} and files.read_into("c/a", 0, memoryview(bytearray(1))) == 1
    changes: list[Callable[[], object]] = [
        lambda: files.replace("c/a", b"2"),
        lambda: files.create("c/b", b"2"),
        lambda: files.replace_if("c/a", b"2", lambda: True),
        lambda: files.remove("c/a"),
        lambda: files.remove_folder("c"),
        lambda: files.drop_unfinished("c"),
        lambda: files.stream("c/b"),
    ]
    for change in changes:
        with pytest.raises(LostError):
            change()
    assert files.read("c/a") == b"1" and files.names("c") == ["a"]


def test_a_journal_that_is_written_meanwhile_by_its_own_is_not_lost(tmp_path: Path) -> None:
    """A check comes from another thread than an append: it may see the file before the append has counted it."""
    files = open_files(str(tmp_path))
    journal = Journal(files)
    journal.append(1, [{"n": 1}])
    journal.check()
    journal._next -= 1
    journal.check()
    journal._next += 1
    write_the_journal(files)
    with pytest.raises(JournalFenced, match=r"000002\.json: written by another controller \(epoch 2\)"):
        journal.check()


# ------------------------------------------------------------ a key that may do less


@pytest.mark.parametrize("answer", [("403 Forbidden", "AccessDenied"), ("501 Not Implemented", "NotImplemented")])
def test_where_what_was_begun_cannot_be_listed_all_else_is_removed(
    answer: tuple[str, str], link: Proxy, linked: Files, direct: Files
) -> None:
    """By a key that may only read, write, remove and list files; or on a server that does not know that call."""
    gone: list[int] = []
    for step in (10, 20, 30):
        save(direct, STATE, step)
    write_parts(direct, Version(25, 1), STATE)
    link.refuse(LISTING, *answer)
    with pytest.raises(StoreError) as caught:
        checkpoints(linked).prune(keep=1, gone=gone.append)
    assert "/checkpoints, unfinished uploads (s3:ListBucketMultipartUploads, " in str(caught.value)
    assert sorted(gone) == [10, 20]
    assert checkpoints(direct).steps() == [30]


def test_what_is_removed_before_the_store_fails_is_told(link: Proxy, linked: Files, direct: Files) -> None:
    gone: list[int] = []
    for step in (10, 20, 30):
        save(direct, STATE, step)
    link.refuse(rb"DELETE .*step-00000010/manifest\.json", "403 Forbidden", "AccessDenied")
    with pytest.raises(StoreError, match="step-00000010"):
        checkpoints(linked).prune(keep=1, gone=gone.append)
    assert gone == [20]
    good, _ = checkpoints(direct).newest_first()
    assert [found.manifest.version.step for found in good] == [30, 10]
