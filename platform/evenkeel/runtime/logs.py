"""Where a process of the run writes what it has to say: logs/<name>.log in the run directory."""

import io
import logging
import os
import sys
import threading
from pathlib import Path
from typing import Any, TextIO

from evenkeel.runtime.compat import log_folder
from evenkeel.store.errors import StoreError
from evenkeel.store.files import Files
from evenkeel.store.retry import retrying
from evenkeel.store.run_directory import RunDirectory


class ProcessLog:
    """Takes over this process's standard output and error, C++ messages and Python's last words included.

    On an object store the file lies among Ray's own logs of this node, and `publish` copies it. A log that cannot be
    written is no reason to end anything: what does not fit on a full disk is lost.
    """

    def __init__(self, folder: str, name: str) -> None:
        run = RunDirectory.at(folder)
        local = run.log_folder
        path = Path(local) / f"{name}.log" if local is not None else log_folder() / f"evenkeel-{name}.log"
        self._copied = None if local is not None else CopiedLog(path, run.files, f"logs/{name}.log")
        try:
            take_over(path)
        except OSError as error:
            logging.warning("the log stays where Ray keeps it, because it cannot be opened: %s", error)

    def publish(self) -> None:
        """Makes what was written so far visible in the run directory."""
        sys.stdout.flush()
        sys.stderr.flush()
        if self._copied is not None:
            self._copied.copy()


class CopiedLog:
    """A local file, and its copy on a store that may fail."""

    def __init__(self, path: Path, files: Files, name: str) -> None:
        self._path, self._files, self._name = path, files, name
        self._one_at_a_time = threading.Lock()  # or a copy that was read earlier could be the last one to arrive

    def copy(self) -> None:
        """Copies what is there now. If the store fails this returns all the same, and tries on in the background:
        whoever publishes a traceback has something to repair."""
        try:
            self._once()
        except (OSError, StoreError) as error:
            logging.warning("the log could not be copied, and will be tried again: %s", error)
            threading.Thread(target=self._patiently, name="log", daemon=True).start()

    def _once(self) -> None:
        with self._one_at_a_time:
            self._files.replace(self._name, self._path.read_bytes())

    def _patiently(self) -> None:
        try:
            retrying(self._once, lambda _: None, threading.Event().wait)
        except (OSError, StoreError) as error:
            logging.warning("the log could not be copied: %s", error)


def take_over(path: Path) -> None:
    """Lets standard output and error go to a file, from now on. Raises OSError where it cannot be opened."""
    path.parent.mkdir(parents=True, exist_ok=True)
    fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    sys.stdout.flush()
    sys.stderr.flush()
    os.dup2(fd, 1)
    os.dup2(fd, 2)
    os.close(fd)
    sys.stdout, sys.stderr = _text(1), _text(2)


def _text(fd: int) -> TextIO:
    raw = io.BufferedWriter(_Lossy(fd, "w", closefd=False))
    return io.TextIOWrapper(raw, encoding="utf-8", errors="backslashreplace", line_buffering=True)


class _Lossy(io.FileIO):
    """On a full disk printing a traceback would raise, in handlers that have better things to do."""

    def write(self, data: Any, /) -> int:
        try:
            return super().write(data)
        except OSError:
            return len(data)
