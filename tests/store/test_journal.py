"""The journal survives everything but two controllers, of which it stops one."""

import json
import multiprocessing
import os
import signal
from pathlib import Path

import pytest

from evenkeel.store.errors import JournalFenced, StoreError
from evenkeel.store.files import Files, LocalFiles
from evenkeel.store.journal import Journal

pytestmark = pytest.mark.stores("moto", "rgw")


def test_entries_come_back_in_order(files: Files) -> None:
    journal = Journal(files)
    assert journal.read_all() == []
    journal.append(1, [{"a": 1}])
    journal.append(1, [])
    journal.append(1, [{"b": 0.1}, {"c": None}])
    again = Journal(files)
    assert again.read_all() == [{"a": 1}, {"b": 0.1}, {"c": None}]
    again.append(2, [{"d": 4}])
    assert Journal(files).read_all()[-1] == {"d": 4}
    assert files.names("journal") == ["000001.json", "000002.json", "000003.json"]
    record = json.loads(files.read("journal/000003.json") or b"")
    assert (record["format"], record["epoch"], len(record["nonce"])) == (1, 2, 32)


def test_the_second_controller_fences_the_first(files: Files) -> None:
    old = Journal(files)
    old.read_all()
    old.append(1, [{"n": 1}])
    new = Journal(files)
    new.read_all()
    new.append(2, [{"n": 2}])
    with pytest.raises(JournalFenced, match=r"000002\.json: written by another controller \(epoch 2\)"):
        old.append(1, [{"n": "lost"}])
    new.append(2, [{"n": 3}])
    assert Journal(files).read_all() == [{"n": 1}, {"n": 2}, {"n": 3}]


def test_two_controllers_with_equal_entries_are_still_two(files: Files) -> None:
    first, second = Journal(files), Journal(files)
    first.append(1, [{"n": 1}])
    with pytest.raises(JournalFenced):
        second.append(1, [{"n": 1}])


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"format": 2, "entries": []}', "has format 2; this evenkeel reads up to 1"),
        ('{"entries": []}', "has no format version"),
        ("[]", "has no format version"),
        ('{"format": 1, "ent', "not valid JSON"),
        ("", "not valid JSON"),
    ],
)
def test_what_cannot_be_read_is_refused_by_name(files: Files, text: str, said: str) -> None:
    files.replace("journal/000001.json", text.encode())
    with pytest.raises(StoreError, match=said) as caught:
        Journal(files).read_all()
    assert files.where("journal/000001.json") in str(caught.value)


def test_a_gap_is_refused(files: Files) -> None:
    for number in (1, 2, 4):
        files.replace(f"journal/{number:06d}.json", b'{"format": 1, "entries": []}')
    with pytest.raises(StoreError, match=r"000003\.json: missing, though journal/000004\.json is there"):
        Journal(files).read_all()


def _append_for_ever(root: str, started: "multiprocessing.synchronize.Event") -> None:
    journal = Journal(LocalFiles(Path(root)))
    number = 0
    while True:
        number += 1
        journal.append(1, [{"n": number, "filler": "x" * 20_000}])
        started.set()


def test_a_killed_writer_leaves_whole_entries(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    started = context.Event()
    writer = context.Process(target=_append_for_ever, args=(str(tmp_path), started))
    writer.start()
    assert started.wait(60)
    assert writer.pid is not None
    os.kill(writer.pid, signal.SIGKILL)
    writer.join()
    journal = Journal(LocalFiles(tmp_path))
    entries = journal.read_all()
    assert [e["n"] for e in entries] == list(range(1, len(entries) + 1))
    journal.append(2, [{"n": 0}])
    assert journal.read_all()[-1] == {"n": 0}
