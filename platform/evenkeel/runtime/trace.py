"""What a controller heard and, in short, what it led to, a line each: to replay it from, and to see what went wrong.

Bounded, however long the run: the first part stays, and of what came after it the last one to two parts.
"""

import json
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

FIRST = "controller-trace.jsonl"
LAST = "controller-trace-last.jsonl"
BEFORE_LAST = "controller-trace-before-last.jsonl"
PART_BYTES = 4 * 2**20
"""Some 10,000 steps without an incident."""


class Trace:
    """Goes on with the trace in `folder`, if there is one. If there is room, a line is there when `write` returns."""

    def __init__(self, folder: Path, part_bytes: int = PART_BYTES) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._part_bytes = part_bytes
        self._open(LAST if (folder / LAST).exists() else FIRST)

    def write(self, line: Mapping[str, Any]) -> None:
        """Where the disk is full, lines wait for the next one: nothing depends on them, and least of all the run."""
        text = json.dumps(line) + "\n"
        with suppress(OSError):
            if self._bytes >= self._part_bytes:
                self._next_part()
            self._bytes += len(text)
            self._file.write(text)
            self._file.flush()

    def _next_part(self) -> None:
        full = self._file
        if (self._folder / LAST).exists():
            os.replace(self._folder / LAST, self._folder / BEFORE_LAST)
        self._open(LAST)
        full.close()

    def close(self) -> None:
        with suppress(OSError):
            self._file.close()

    def _open(self, name: str) -> None:
        self._file = (self._folder / name).open("a", encoding="ascii")
        self._bytes = self._file.tell()
