"""Measures inside the workers of the engine what cannot be seen from outside: what a checkpoint takes, and memory.

The engine is not changed for it: its dataset and its `save` are wrapped, and so is Saver.copy, which is all of a
checkpoint that the training thread does. What is found is written as lines of JSON, a file for each worker.
"""

import ctypes
import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.plain import write_plainly
from bench.saved import FLOOR, MEMORY, PLAIN, WRITES
from bench.work import WARM_UP
from evenkeel.core.ids import Version, WorkerId
from evenkeel.engine.job import Dataset, Job, Piece
from evenkeel.engine.memory import forget_peak, peak_bytes
from evenkeel.engine.saver import Saver

CPU = torch.device("cpu")


@dataclass(frozen=True, slots=True)
class Probed:
    """Makes the same job as `make`, with probes in it. Picklable.

    Attributes:
        folder: for the lines.
    """

    make: Callable[[WorkerId], Job]
    folder: str
    measures: tuple[str, ...]

    def __call__(self, worker_id: WorkerId) -> Job:
        job = self.make(worker_id)
        lines = _Lines(Path(self.folder) / f"inside-{worker_id}.jsonl", worker_id)
        if MEMORY in self.measures:
            job = replace(job, train=_Watched(job.train, lines))
        if {FLOOR, PLAIN, WRITES} & set(self.measures):
            probe = _Probe(job, lines, Path(self.folder), FLOOR in self.measures, PLAIN in self.measures)
            probe.wrap_copy()
            job = replace(job, save=probe.save)
        return job


class _Lines:
    def __init__(self, path: Path, worker_id: WorkerId) -> None:
        self._worker = worker_id
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)

    def write(self, **values: object) -> None:
        os.write(self._file, (json.dumps({"worker": self._worker, **values}) + "\n").encode())


class _Watched:
    """A dataset at whose every use it is seen whether the process has had more in memory than ever before.

    From its tenth use on: what was free again when the training began would hide what checkpoints add to it.
    """

    def __init__(self, data: Dataset, lines: _Lines) -> None:
        self._data, self._lines = data, lines
        self._uses = self._peak = 0

    def __len__(self) -> int:
        return len(self._data)

    def get(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        self._uses += 1
        if self._uses == WARM_UP:
            forget_peak(CPU)
        elif self._uses > WARM_UP and (peak := peak_bytes(CPU)) > self._peak:
            self._peak = peak
            self._lines.write(peak_bytes=peak)
        return self._data.get(indices)


@dataclass
class _Probe:
    """Between the engine and the store: it sees the copy of each checkpoint, and its write.

    Attributes:
        copies: by version, what the copy took; until it is written.
        room, source: what the engine copies its part to, and as much memory besides, once a first write has shown it.
    """

    job: Job
    lines: _Lines
    folder: Path
    floor: bool
    plain: bool
    copies: dict[Version, dict[str, float]] = field(default_factory=dict)
    room: Tensor | None = None
    source: Tensor | None = None
    plain_first: bool = False

    def wrap_copy(self) -> None:
        original = Saver.copy

        def copy(saver: Saver, version: Version, last: bool) -> None:
            if saver.busy:  # that of the last step, done later by another thread
                original(saver, version, last)
                return
            floors = [self._one_copy(), self._one_copy()]
            cpu, began = time.thread_time(), time.perf_counter()
            original(saver, version, last)
            copy_s = time.perf_counter() - began
            found = {"copy_s": copy_s, "copy_cpu_s": time.thread_time() - cpu, "copied_at": time.time()}
            taken = [floor for floor in floors if floor is not None]
            # The first meets the end of the other workers' step, and would make ours look better.
            self.copies[version] = {**found, "floor_s": min(taken), "floors_s": sum(taken)} if taken else found

        Saver.copy = copy

    def _one_copy(self) -> float | None:
        """Seconds for as many bytes from other memory of this process to the very same place, by C's memmove.

        All of it was used before.
        """
        if self.room is None or self.source is None:
            return None
        began = time.perf_counter()
        ctypes.memmove(self.room.data_ptr(), self.source.data_ptr(), self.room.nbytes)
        return time.perf_counter() - began

    def save(
        self,
        version: Version,
        worker_id: WorkerId,
        pieces: Sequence[Piece],
        report: Callable[[str], None],
        moved: Callable[[], None],
    ) -> str:
        assert self.job.save is not None
        room = _storage(pieces)
        found: dict[str, Any] = {"began": time.time(), "plain_first": self.plain and self.plain_first}
        if self.plain and self.plain_first:
            found["plain_cpu_s"] = self._write_plainly(room)
        cpu, began = time.thread_time(), time.time()
        part = self.job.save(version, worker_id, pieces, report, moved)
        found |= {"write_cpu_s": time.thread_time() - cpu, "write_began": began, "write_ended": time.time()}
        if self.plain and not self.plain_first:
            found["plain_cpu_s"] = self._write_plainly(room)
        if self.plain:
            # Not before: whoever writes next would be given the pages that this one set free, which costs much less.
            self._plain_file.unlink()
        self.plain_first = not self.plain_first
        found |= {"step": version.step, "bytes": sum(piece.data.nbytes for piece in pieces), "ended": time.time()}
        self.lines.write(**found, **self.copies.pop(version, {}))
        if self.floor and self.room is None:
            self.room, self.source = room, room.clone()
        return part

    @property
    def _plain_file(self) -> Path:
        return self.folder / f"plain-{os.getpid()}"

    def _write_plainly(self, room: Tensor) -> float:
        """CPU seconds of this thread."""
        cpu = time.thread_time()
        write_plainly(self._plain_file, [memoryview(room.numpy().data).cast("B")])
        return time.thread_time() - cpu


def _storage(pieces: Sequence[Piece]) -> Tensor:
    """All of the memory that the pieces are views of, as bytes."""
    return torch.empty(0, dtype=torch.uint8).set_(pieces[0].data.untyped_storage())
