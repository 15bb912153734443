"""JSON lines that grow: one file on a local path, numbered segments on an object store."""

import json
import os
import time
from collections.abc import Callable, Iterable, Mapping
from math import isfinite
from typing import Any, Protocol

from evenkeel.store.errors import StoreError
from evenkeel.store.failures import explain
from evenkeel.store.files import Files, LocalFiles
from evenkeel.store.untrusted import parse_json

SEGMENT_LINES = 1000
FLUSH_LINES = 100
FLUSH_S = 5.0

Record = dict[str, Any]


class LineWriter(Protocol):
    """`name` is the file without its ending, such as "metrics". One writer at a time."""

    def write(self, record: Mapping[str, Any]) -> None:
        """Appends one line. Raises StoreError if it is not accepted; then it is not there."""

    def flush(self) -> None:
        """Returns when all lines are visible to readers."""

    def close(self) -> None: ...


def line_writer(files: Files, name: str) -> LineWriter:
    return LocalLines(files, name) if isinstance(files, LocalFiles) else SegmentLines(files, name)


class LocalLines:
    """Appends each line with one write, at once visible. Durable over a process's death, not over a machine's."""

    def __init__(self, files: LocalFiles, name: str) -> None:
        self._path = files.path(f"{name}.jsonl")
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._fd = os.open(self._path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)
            self._drop_torn_line()
        except OSError as error:
            raise StoreError(f"{self._path}: {explain(error)}") from error

    def _drop_torn_line(self) -> None:
        """A writer that died within a write leaves a line without an end, which no reader has taken."""
        size = os.fstat(self._fd).st_size
        kept = size
        while kept:
            begin = max(0, kept - 4096)
            newline = os.pread(self._fd, kept - begin, begin).rfind(b"\n")
            if newline >= 0:
                kept = begin + newline + 1
                break
            kept = begin
        if kept != size:
            os.ftruncate(self._fd, kept)

    def write(self, record: Mapping[str, Any]) -> None:
        try:
            append(self._fd, to_line(record))
        except OSError as error:
            raise StoreError(f"{self._path}: {explain(error)}") from error

    def flush(self) -> None:
        """Every line is visible already."""

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


class SegmentLines:
    """Numbered segments name/000001.jsonl, …; the newest is written again as a whole when it is time to flush.

    A new writer begins a segment of its own, so one that lost the run cannot overwrite its lines.
    """

    def __init__(self, files: Files, name: str, clock: Callable[[], float] = time.monotonic) -> None:
        self._files, self._folder, self._clock = files, name, clock
        self._number = 0
        self._lines: list[bytes] = []
        self._waiting = 0
        self._since = 0.0

    def write(self, record: Mapping[str, Any]) -> None:
        if len(self._lines) >= SEGMENT_LINES:
            self.flush()
            self._lines, self._number = [], 0
        self._lines.append(to_line(record))
        self._waiting += 1
        if self._waiting == 1:
            self._since = self._clock()
        if self._waiting >= FLUSH_LINES or self._clock() - self._since >= FLUSH_S:
            self.flush()

    def flush(self) -> None:
        if not self._waiting:
            return
        data = b"".join(self._lines)
        if self._number:
            self._files.replace(_segment(self._folder, self._number), data)
        else:
            self._number = self._begin(data)
        self._waiting = 0

    def _begin(self, data: bytes) -> int:
        numbers = _segment_numbers(self._files.names(self._folder))
        number = numbers[-1] + 1 if numbers else 1
        while not self._files.create(_segment(self._folder, number), data):
            number += 1
        return number

    def close(self) -> None:
        self.flush()


class LineReader:
    """Follows the lines of a file or of segments; each line is given out once."""

    def __init__(self, files: Files, name: str) -> None:
        self._files, self._name = files, name
        self._local = isinstance(files, LocalFiles)
        self._offset = 0
        self._number = 1
        self._taken = 0

    def poll(self) -> list[Record]:
        """The complete lines that came since the last call, oldest first.

        Raises:
            StoreError: if a line is not a JSON object.
        """
        return self._poll_file() if self._local else self._poll_segments()

    def _poll_file(self) -> list[Record]:
        name = f"{self._name}.jsonl"
        data = self._files.read(name, self._offset) or b""
        whole = data[: data.rfind(b"\n") + 1]
        self._offset += len(whole)
        return _parse(whole.splitlines(), self._files.where(name))

    def _poll_segments(self) -> list[Record]:
        records: list[Record] = []
        for number in _segment_numbers(self._files.names(self._name)):
            if number < self._number:
                continue
            if number > self._number:
                self._number, self._taken = number, 0
            name = _segment(self._name, number)
            lines = (self._files.read(name) or b"").splitlines()
            records += _parse(lines[self._taken :], self._files.where(name))
            self._taken = len(lines)
        return records


def _parse(lines: Iterable[bytes], where: str) -> list[Record]:
    records: list[Record] = []
    for line in lines:
        try:
            record = parse_json(line)
        except ValueError:
            record = None
        if not isinstance(record, dict):
            raise StoreError(f"{where}: not a line of JSON: {line[:60]!r}")
        records.append(record)
    return records


def _segment(folder: str, number: int) -> str:
    return f"{folder}/{number:06d}.jsonl"


def _segment_numbers(names: Iterable[str]) -> list[int]:
    return sorted(int(n[:-6]) for n in names if n.endswith(".jsonl") and n[:-6].isdecimal())


def append(fd: int, data: bytes) -> None:
    """Appends all of it to a file of one writer, with one write as a rule; or none of it, and raises OSError."""
    written = 0
    try:
        while written < len(data):
            written += os.write(fd, data[written:])
    except OSError:
        if written:
            os.ftruncate(fd, os.fstat(fd).st_size - written)
        raise


def to_line(record: Mapping[str, Any]) -> bytes:
    """One line of strict JSON. Numbers that JSON does not have become "nan", "inf" or "-inf"."""
    try:
        text = json.dumps(record, allow_nan=False)
    except ValueError:
        text = json.dumps(_finite(record), allow_nan=False)
    return text.encode() + b"\n"


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not isfinite(value):
        return repr(value)
    if isinstance(value, Mapping):
        return {k: _finite(v) for k, v in value.items()}
    return [_finite(v) for v in value] if isinstance(value, list | tuple) else value
