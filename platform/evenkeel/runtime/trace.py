"""What a controller heard and, in short, what it led to, a line each: to replay it from, and to see what went wrong.

Bounded, however long the run: the first part stays, and of what came after it the last one to two parts. Nothing of the
run depends on it: where it cannot be written any more, as on a full disk, it ends.
"""

import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from evenkeel.store.lines import append

FIRST = "controller-trace.jsonl"
LAST = "controller-trace-last.jsonl"
BEFORE_LAST = "controller-trace-before-last.jsonl"
PART_BYTES = 4 * 2**20
"""Some 10,000 steps without an incident."""


class Trace:
    """Goes on with the trace in `folder`, if there is one. Every line is in the file when `write` returns."""

    def __init__(self, folder: Path, part_bytes: int = PART_BYTES) -> None:
        self._folder = folder
        self._part_bytes = part_bytes
        self._fd: int | None = None
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._open(LAST if (folder / LAST).exists() else FIRST)
        except OSError as error:
            self._give_up(error)

    def write(self, line: Mapping[str, Any]) -> None:
        if self._fd is None:
            return
        data = json.dumps(line).encode() + b"\n"
        try:
            if self._bytes >= self._part_bytes:
                self.close()
                if self._name == LAST:
                    os.replace(self._folder / LAST, self._folder / BEFORE_LAST)
                self._open(LAST)
            append(self._fd, data)
            self._bytes += len(data)
        except OSError as error:
            self._give_up(error)

    def close(self) -> None:
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None

    def _open(self, name: str) -> None:
        self._name = name
        self._fd = os.open(self._folder / name, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)
        self._bytes = os.fstat(self._fd).st_size

    def _give_up(self, error: OSError) -> None:
        logging.warning("the trace of the controller ends here: %s: %s", self._folder, error.strerror)
        self.close()
