"""Where a process of the run writes what it has to say: logs/<name>.log in the run directory."""

import os
import sys
from contextlib import suppress
from pathlib import Path

from evenkeel.runtime.compat import log_folder
from evenkeel.store.errors import StoreError
from evenkeel.store.run_directory import RunDirectory


class ProcessLog:
    """Takes over this process's standard output and error, C++ messages and Python's last words included.

    On an object store the file lies among Ray's own logs of this node, and `publish` copies it.
    """

    def __init__(self, folder: str, name: str) -> None:
        self._run = RunDirectory.at(folder)
        self._name = f"logs/{name}.log"
        local = self._run.log_folder
        self._path = Path(local) / f"{name}.log" if local is not None else log_folder() / f"evenkeel-{name}.log"
        self._remote = local is None
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._take_over()

    def _take_over(self) -> None:
        fd = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        sys.stdout.flush()
        sys.stderr.flush()
        os.dup2(fd, 1)
        os.dup2(fd, 2)
        os.close(fd)

    def publish(self) -> None:
        """Makes what was written so far visible in the run directory, if that can be done: it is here in any case."""
        with suppress(OSError, StoreError):
            sys.stdout.flush()
            sys.stderr.flush()
            if self._remote:
                self._run.files.replace(self._name, self._path.read_bytes())
