"""JSON lines: visible at once on a disk, in segments on an object store, and never a torn one."""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from evenkeel.store.errors import StoreError
from evenkeel.store.files import Files, LocalFiles, ObjectFiles, open_files
from evenkeel.store.lines import FLUSH_LINES, FLUSH_S, SEGMENT_LINES, LineReader, LocalLines, SegmentLines, line_writer

pytestmark = pytest.mark.stores("moto", "rgw")


def test_what_is_flushed_is_read_once_and_in_order(files: Files) -> None:
    writer, reader = line_writer(files, "metrics"), LineReader(files, "metrics")
    assert reader.poll() == []
    seen = []
    for step in range(1, 8):
        writer.write({"step": step, "loss": 1 / step})
        if step % 3 == 0:
            writer.flush()
            seen += reader.poll()
            assert reader.poll() == []
    writer.close()
    seen += reader.poll()
    assert seen == [{"step": s, "loss": 1 / s} for s in range(1, 8)]


def test_a_new_writer_goes_on(files: Files) -> None:
    reader = LineReader(files, "metrics")
    for step in (1, 2):
        writer = line_writer(files, "metrics")
        writer.write({"step": step})
        writer.close()
    assert [r["step"] for r in reader.poll()] == [1, 2]


def test_a_local_line_is_visible_at_once_to_another_process(tmp_path: Path) -> None:
    writer = LocalLines(LocalFiles(tmp_path), "metrics")
    writer.write({"step": 1})
    code = "import sys; print(open(sys.argv[1]).read(), end='')"
    path = str(tmp_path / "metrics.jsonl")
    done = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True, check=True)
    assert done.stdout == '{"step": 1}\n'


@pytest.mark.parametrize("torn", [b'{"step": 2', b"x" * 10_000])
@pytest.mark.parametrize("whole", [b"", b'{"step": 1}\n', b'{"step": 0}\n' * 1000 + b'{"step": 1}\n'])
def test_a_line_that_a_dead_writer_left_without_an_end_is_dropped(tmp_path: Path, whole: bytes, torn: bytes) -> None:
    path = tmp_path / "events.jsonl"
    path.write_bytes(whole + torn)
    reader = LineReader(LocalFiles(tmp_path), "events")
    before = reader.poll()
    LocalLines(LocalFiles(tmp_path), "events").write({"step": 9})
    assert path.read_bytes() == whole + b'{"step": 9}\n'
    assert len(before) == whole.count(b"\n")
    assert reader.poll() == [{"step": 9}]


def test_a_full_disk_is_told(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    writer = LocalLines(LocalFiles(tmp_path), "metrics")
    with pytest.raises(StoreError, match="No space left"):
        writer.write({"step": 1})


def test_a_partial_write_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = LocalLines(LocalFiles(tmp_path), "metrics")
    writer.write({"step": 1})
    whole, sizes = os.write, iter((5, 0))

    def fills_the_disk(fd: int, data: bytes) -> int:
        if size := next(sizes):
            return whole(fd, data[:size])
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(os, "write", fills_the_disk)
    with pytest.raises(StoreError, match="No space left"):
        writer.write({"step": 2})
    assert (tmp_path / "metrics.jsonl").read_bytes() == b'{"step": 1}\n'


def test_numbers_that_json_lacks_become_words(files: Files) -> None:
    writer = line_writer(files, "events")
    writer.write({"loss": float("nan"), "deep": [{"x": float("-inf")}], "fine": 0.1})
    writer.close()
    assert LineReader(files, "events").poll() == [{"loss": "nan", "deep": [{"x": "-inf"}], "fine": 0.1}]


def test_a_damaged_line_is_told_with_its_file(tmp_path: Path) -> None:
    (tmp_path / "events.jsonl").write_text('{"a": 1}\nnot json\n')
    with pytest.raises(StoreError, match=r"events\.jsonl: not a line of JSON"):
        LineReader(LocalFiles(tmp_path), "events").poll()


@pytest.fixture
def objects(tmp_path: Path) -> ObjectFiles:
    files = open_files(f"memory://{tmp_path.name}")
    assert isinstance(files, ObjectFiles)
    return files


def test_segments_are_flushed_by_count_and_by_age(objects: ObjectFiles) -> None:
    now = 0.0
    writer, reader = SegmentLines(objects, "metrics", clock=lambda: now), LineReader(objects, "metrics")
    for step in range(FLUSH_LINES - 1):
        writer.write({"step": step})
    assert reader.poll() == []
    writer.write({"step": FLUSH_LINES - 1})
    assert len(reader.poll()) == FLUSH_LINES
    writer.write({"step": FLUSH_LINES})
    assert reader.poll() == []
    now += FLUSH_S
    writer.write({"step": FLUSH_LINES + 1})
    assert [r["step"] for r in reader.poll()] == [FLUSH_LINES, FLUSH_LINES + 1]
    assert objects.names("metrics") == ["000001.jsonl"]


def test_full_segments_are_followed_by_new_ones(objects: ObjectFiles) -> None:
    writer, reader = SegmentLines(objects, "metrics"), LineReader(objects, "metrics")
    seen = []
    for step in range(2 * SEGMENT_LINES + 1):
        writer.write({"step": step})
        if step % 333 == 0:
            seen += reader.poll()
    writer.close()
    seen += reader.poll()
    assert [r["step"] for r in seen] == list(range(2 * SEGMENT_LINES + 1))
    assert objects.names("metrics") == ["000001.jsonl", "000002.jsonl", "000003.jsonl"]


def test_a_writer_that_lost_the_run_overwrites_nothing(objects: ObjectFiles) -> None:
    old = SegmentLines(objects, "metrics")
    old.write({"step": 1})
    old.flush()
    new = SegmentLines(objects, "metrics")
    new.write({"step": 2})
    new.flush()
    old.write({"step": 99})
    old.flush()
    new.write({"step": 3})
    new.flush()
    lines = [json.loads(x) for x in (objects.read("metrics/000002.jsonl") or b"").splitlines()]
    assert lines == [{"step": 2}, {"step": 3}]


def test_a_failed_flush_is_made_up_for_by_the_next(objects: ObjectFiles, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = SegmentLines(objects, "metrics")
    writer.write({"step": 1})
    writer.flush()

    def refuse(name: str, data: bytes) -> None:
        raise StoreError("down")

    with monkeypatch.context() as patch:
        patch.setattr(objects, "replace", refuse)
        writer.write({"step": 2})
        with pytest.raises(StoreError):
            writer.flush()
    writer.write({"step": 3})
    writer.flush()
    assert [r["step"] for r in LineReader(objects, "metrics").poll()] == [1, 2, 3]
