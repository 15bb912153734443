"""Measured commands: bounded in time, their CPU seconds counted, nothing of them left behind."""

import os
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "jobs"))

from bench.process import BenchError, running

PARENT = """
import os, subprocess, sys, time
subprocess.Popen([sys.executable, "-c", {child!r}], start_new_session=True)
while not os.path.exists({ready!r}): time.sleep(0.01)
"""
CHILD = """
import signal, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
open({ready!r}, "w").write(str(__import__("os").getpid()))
time.sleep(600)
"""


def test_a_daemon_that_left_the_session_and_ignores_sigterm_is_ended_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bench.process.END_S", 0.3)
    ready = tmp_path / "ready"
    code = PARENT.format(child=CHILD.format(ready=str(ready)), ready=str(ready))
    with running([sys.executable, "-c", code], tmp_path / "log", {}) as process:
        process.wait(60)
        pid = int(ready.read_text())
        os.kill(pid, 0)
    with pytest.raises(ProcessLookupError):
        _alive(pid)


def _alive(pid: int) -> None:
    """Raises ProcessLookupError for one that is gone, or dead and waiting for its parent to notice."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        raise ProcessLookupError from None
    if state == "Z":
        raise ProcessLookupError


def test_a_command_that_takes_too_long_or_fails_gives_no_measurement(tmp_path: Path) -> None:
    sleep = [sys.executable, "-c", "import time; print('at work', flush=True); time.sleep(600)"]
    with running(sleep, tmp_path / "a", {}) as process, pytest.raises(BenchError, match="took more than"):
        process.wait(0.1)
    fail = [sys.executable, "-c", "print('what went wrong'); raise SystemExit(3)"]
    with (
        running(fail, tmp_path / "b", {}) as process,
        pytest.raises(BenchError, match="status 3: what went wrong"),
    ):
        process.wait(60)


def test_cpu_time_of_a_command_is_counted(tmp_path: Path) -> None:
    burn = "import time\nwhile time.process_time() < 1.2: pass"
    with running([sys.executable, "-c", burn], tmp_path / "log", {}) as process:
        process.wait(600)
    assert 0.3 < max(process.cpu.own) < 3.0
    assert process.cpu.machine[-1] - process.cpu.machine[0] > 0.3
