"""A disk that is full, for real: the run ends with one line, and what is only told may be lost."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from ray_runs import ROOT, Site
from stores import small_disk

from evenkeel.runtime.trace import FIRST, Trace
from evenkeel.store.errors import StoreError
from evenkeel.store.lines import LocalLines
from evenkeel.store.run_directory import RunDirectory

DISK_KIB = 2048


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own, of DISK_KIB KiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    with small_disk(folder, DISK_KIB):
        yield folder


def fill(folder: Path) -> None:
    """Leaves not one byte."""
    with (folder / "filler").open("ab", buffering=0) as file:
        for size in (4096, 1):
            try:
                while file.write(b"x" * size):
                    pass
            except OSError:
                continue


@pytest.mark.soak
def test_a_run_whose_disk_stays_full_ends_with_one_line(site: Site, disk: Path) -> None:
    changes = {"train": {"steps": 1_000_000}}
    started = site.start(changes, f"run.storage_path={disk}")
    run = RunDirectory.of(str(disk), "run")
    reader = run.follow("metrics")
    started.until(lambda: any(line["step"] >= 2 for line in reader.poll()))
    fill(disk)
    done = started.finish()
    assert done.status == 3
    assert done.err.startswith(f"evenkeel: {disk}/run/") and done.err.count("\n") == 1
    assert "No space left on device; free some, or use another run.storage_path" in done.err
    assert "internal error" not in done.err


LINE = {"step": 1, "text": "x" * 1000}


def write_on(lines: LocalLines) -> None:
    while True:
        lines.write(LINE)


def test_lines_are_appended_whole_or_not_at_all(disk: Path) -> None:
    run = RunDirectory.at(str(disk))
    lines = LocalLines(run.files, "metrics")  # type: ignore[arg-type]
    with pytest.raises(StoreError, match=r"metrics\.jsonl: No space left on device; free some"):
        write_on(lines)
    assert all(line == LINE for line in run.follow("metrics").poll())
    assert (disk / "metrics.jsonl").read_bytes().endswith(b"}\n")
    lines.close()


def test_a_trace_ends_where_the_disk_does(disk: Path) -> None:
    trace = Trace(disk)
    for _ in range(DISK_KIB * 2):
        trace.write({"text": "x" * 1000})
    assert (disk / FIRST).read_bytes().endswith(b"}\n")
    Trace(disk).write({"text": "x"})


LOG = """
import logging, os, sys, traceback
from pathlib import Path
from evenkeel.runtime.logs import take_over
out = os.dup(1)
take_over(Path("/dev/full"))
try:
    raise ValueError("no")
except ValueError:
    traceback.print_exc()
logging.error("no")
print("no", flush=True)
sys.stderr.flush()
os.write(out, b"alive")
"""


def test_a_log_that_is_full_hurts_nobody() -> None:
    assert answer(LOG).stdout == b"alive"


COMMIT = """
from evenkeel.engine.worker import _die
try:
    raise ValueError("no")
except ValueError:
    _die(str)
"""


def test_torn_state_dies_although_nothing_can_be_printed() -> None:
    with Path("/dev/full").open("wb") as full:
        assert answer(COMMIT, stderr=full).returncode == 70


def answer(code: str, **streams: object) -> "subprocess.CompletedProcess[bytes]":
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "platform")}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **streams}
    return subprocess.run([sys.executable, "-c", code], env=environment, timeout=60, **pipes)  # type: ignore[call-overload]
