"""A worker's part of a checkpoint: copied between steps, written meanwhile; slow, failing, and at the end of a run."""

import errno
import json
import os
import queue
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tiny import Tiny, layout_of

from evenkeel.control import messages as m
from evenkeel.control.policy import Policy
from evenkeel.core.boxes import Box
from evenkeel.core.ids import NodeId, Version, WorkerId
from evenkeel.core.layout import WorkerInfo
from evenkeel.engine.faults import Faults
from evenkeel.engine.job import CheckpointError, Job, Piece
from evenkeel.engine.local import LocalRun, static_world
from evenkeel.engine.model import model_shape
from evenkeel.engine.saver import STUCK_S, Saver
from evenkeel.engine.state import ShardState
from evenkeel.plan.copies import copies_of
from evenkeel.plan.layout import Wish
from evenkeel.plan.state import KINDS
from evenkeel.runtime import saving
from evenkeel.store.checkpoint_part import Piece as PartPiece
from evenkeel.store.errors import StoreError
from evenkeel.store.files import LocalFiles, Sink
from evenkeel.store.retry import Patience, Trouble, retrying
from evenkeel.store.run_directory import RunDirectory


@dataclass(frozen=True)
class Saved(Tiny):
    """Writes parts as files of torch tensors, each after `slow_s`."""

    slow_s: float = 0.0

    def __call__(self, worker_id: WorkerId) -> Job:
        return replace(super().__call__(worker_id), save=self._save, load=self._load)

    def _save(self, version: Version, worker_id: WorkerId, pieces: list[Piece], *_: object) -> str:
        threading.Event().wait(self.slow_s)
        path = self.folder / f"{version.step}-{version.generation}-{worker_id}.pt"
        torch.save([(p.tensor, p.box, p.shape, p.data.clone()) for p in pieces], path)
        return str(path)

    def _load(self, version: Version, pieces: list[Piece], moved: object) -> None:
        state = self.state(version)
        for piece in pieces:
            if piece.tensor not in state:
                raise CheckpointError(f"no {piece.tensor}")
            piece.data.copy_(state[piece.tensor][piece.box.slices].reshape(-1))

    def state(self, version: Version) -> dict[str, torch.Tensor]:
        """All tensors whole; NaN where nobody wrote, and where two did the test fails."""
        whole: dict[str, torch.Tensor] = {}
        for path in self.folder.glob(f"{version.step}-{version.generation}-*.pt"):
            for tensor, box, shape, data in torch.load(path, weights_only=False):
                target = whole.setdefault(tensor, torch.full(shape, float("nan"), dtype=data.dtype))
                assert target[box.slices].isnan().all(), f"{tensor} {box} is written twice"
                target[box.slices] = data.view(box.shape)
        return whole


class Shell(LocalRun):
    """Completes checkpoints, as the Ray shell does."""

    def _carry_out(self, command: m.Command) -> None:
        if isinstance(command, m.CommitCheckpoint):
            self.fleet.events.put(m.CheckpointCommitted(command.version, len(command.parts)))
        else:
            super()._carry_out(command)


def policy(job: Tiny, every: int, **options: object) -> Policy:
    wish = Wish(data=2, pipeline=2, tensor=1, min_workers=4, max_workers=4)
    return Policy(model_shape(job.model()), wish, 4, job.steps, checkpoint_every=every, **options)


@pytest.mark.parametrize("copies", [None, 1])
def test_every_checkpoint_is_the_state_after_its_step(copies: int | None, tmp_path: Path) -> None:
    """The last one is what the final model says, and an earlier one leads to it."""
    job = Saved(tmp_path, steps=6, tied=True)
    outcome = Shell(job, policy(job, 2, copies=copies)).run()
    assert (outcome.status, outcome.error) == ("finished", "")
    assert [e.fields["checkpoint"] for e in outcome.named("checkpoint_committed")] == [2, 4, 6]
    last = job.state(Version(6, 1))
    params = job.final()
    assert last.keys() == {f"{kind}/{name}" for kind in KINDS for name in params}
    assert all(torch.equal(last[f"param/{name}"], value) for name, value in params.items())
    assert not any(value.isnan().any() for version in (2, 4, 6) for value in job.state(Version(version, 1)).values())


def test_a_slow_store_never_tears_a_copy_and_the_last_step_is_saved(tmp_path: Path) -> None:
    """Asked for in every step, but written only when the last one is; each is of one step throughout."""
    job = Saved(tmp_path, steps=12, slow_s=0.3)
    outcome = Shell(job, policy(job, 1)).run()
    assert (outcome.status, outcome.error) == ("finished", "")
    saved = [e.fields["checkpoint"] for e in outcome.named("checkpoint_committed")]
    assert saved[-1] == 12 and len(saved) < 12
    quick = Saved(tmp_path / "quick", steps=12)
    quick.folder.mkdir()
    assert Shell(quick, policy(quick, 1)).run().losses == outcome.losses
    for step in saved:
        mine, truth = job.state(Version(step, 1)), quick.state(Version(step, 1))
        if truth:
            assert all(torch.equal(mine[name], value) for name, value in truth.items()), step


class Held:
    """A store that takes one part at a time, for as long as it is held."""

    def __init__(self) -> None:
        self.free = threading.Event()
        self.moved: Callable[[], None] = bool

    def save(self, version: Version, worker: WorkerId, _: object, report: object, moved: Callable[[], None]) -> str:
        self.moved = moved
        self.free.wait()
        return f"{worker} {version.step}"


def begun(job: Job, sent: "queue.SimpleQueue[m.Event]") -> tuple[Saver, ShardState]:
    """The saver of the only worker of a world, "a", and what it saves."""
    worker = WorkerInfo(WorkerId("a"), NodeId("n"), 1)
    world = static_world([worker], layout_of([worker.worker_id], [[0, 4]], 1, [4]), 9)
    saver = Saver(worker.worker_id, job, Faults(worker.worker_id, (), bool), sent.put)
    state = ShardState(job.model, job.shape, world.layout.shard(worker.worker_id))
    saver.begin(state, world.layout, copies_of(world, job.shape))
    return saver, state


def test_nobody_waits_for_a_writer_that_gets_no_further(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A store that hangs does not keep others from going on, nor the run from being stopped; each checkpoint fails."""
    job, store = Tiny(tmp_path)(WorkerId("a")), Held()
    job.save = store.save
    sent: queue.SimpleQueue[m.Event] = queue.SimpleQueue()
    monkeypatch.setattr("evenkeel.engine.saver.TELL_S", 0.01)
    saver, _ = begun(job, sent)
    saver.copy(Version(1, 1), last=False)
    assert saver.busy
    time.sleep(0.1)
    assert sent.empty()  # no sign of progress where there is none
    store.moved()
    assert sent.get() == m.StillWriting(WorkerId("a"), Version(1, 1))
    monkeypatch.setattr("evenkeel.engine.saver.STUCK_S", 0.0)
    assert not saver.busy
    saver.copy(Version(2, 1), last=False)
    failed = sent.get()
    assert isinstance(failed, m.PartFailed) and failed.version == Version(2, 1) and "no progress" in failed.error
    monkeypatch.undo()
    store.free.set()
    written = sent.get()
    assert isinstance(written, m.PartWritten) and (written.part, written.version) == ("a 1", Version(1, 1))
    assert written.stall_s > 0
    saver.close()


class Copied:
    """A store that keeps what it is given, once it is let go on; `moved` is that of the part that waits."""

    def __init__(self) -> None:
        self.free = threading.Event()
        self.moved: Callable[[], None] = bool
        self.parts: dict[int, list[torch.Tensor]] = {}

    def save(self, version: Version, _: str, pieces: list[Piece], report: object, moved: Callable[[], None]) -> str:
        self.moved = moved
        self.free.wait()
        self.parts[version.step] = [piece.data.clone() for piece in pieces]
        return str(version.step)

    def values(self) -> dict[int, set[float]]:
        """All numbers that each step's part holds."""
        return {step: {float(x) for part in parts for x in part} for step, parts in self.parts.items()}


@dataclass
class Copying:
    """The saver of the only worker of a world, whose store is a Copied; what it sends, and the state that it saves."""

    job: Job
    store: Copied
    sent: "queue.SimpleQueue[m.Event]"
    saver: Saver
    state: ShardState

    def train(self, value: float) -> None:
        for _, _, view in self.state.pieces():
            view.fill_(value)

    def copy(self, step: int, value: float, last: bool = False) -> None:
        """Copies the state after a step: this number everywhere."""
        self.train(value)
        self.saver.copy(Version(step, 1), last=last)


@pytest.fixture
def copying(tmp_path: Path) -> Copying:
    job, store = Tiny(tmp_path)(WorkerId("a")), Copied()
    job.save = store.save
    sent: queue.SimpleQueue[m.Event] = queue.SimpleQueue()
    return Copying(job, store, sent, *begun(job, sent))


def test_a_writer_that_was_stuck_and_moves_again_copies_nothing_later(
    copying: Copying, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It did not say busy in the vote, and the disk came back before the copy: the state goes on changing, so it must
    not be copied when there is room at last, beside the steps after it."""
    saver, store, sent = copying.saver, copying.store, copying.sent
    copying.copy(1, 1.0)
    with monkeypatch.context() as stuck:
        stuck.setattr("evenkeel.engine.saver.STUCK_S", 0.0)
        assert not saver.busy  # as it says in the vote of step 2
    store.moved()
    assert saver.busy
    copying.copy(2, 2.0)
    copying.train(3.0)
    store.free.set()
    saver.close()
    events = [sent.get_nowait() for _ in range(sent.qsize())]
    assert [(type(event), event.version) for event in events if isinstance(event, m.PartWritten | m.PartFailed)] == [
        (m.PartFailed, Version(2, 1)),
        (m.PartWritten, Version(1, 1)),
    ]
    assert store.values() == {1: {1.0}}


def test_the_last_step_is_copied_when_there_is_room(copying: Copying) -> None:
    """No step comes after it, so that it is whole whenever it is copied."""
    copying.copy(8, 1.0)
    copying.copy(9, 2.0, last=True)
    copying.store.free.set()
    copying.saver.close()
    assert copying.store.values() == {8: {1.0}, 9: {2.0}}


def test_a_part_is_told_again(copying: Copying, tmp_path: Path) -> None:
    """As often as it is asked for: written, or failed."""
    saver, sent = copying.saver, copying.sent
    saver.tell_again()
    assert sent.empty()
    copying.copy(1, 1.0)
    saver.tell_again()
    assert sent.empty()
    copying.store.free.set()
    written = sent.get()
    assert isinstance(written, m.PartWritten)
    saver.tell_again()
    assert sent.get_nowait() == written
    copying.job.save = partial(open, tmp_path / "nowhere" / "part")  # fails
    copying.copy(2, 1.0)
    failed = sent.get()
    assert isinstance(failed, m.PartFailed) and failed.version == Version(2, 1)
    saver.tell_again()
    assert sent.get_nowait() == failed
    saver.close()


def part_of(root: Path) -> Callable[..., str]:
    """Writes a part as a run does: as a file of a run directory."""
    run = RunDirectory.at(str(root))

    def save(version: Version, worker: WorkerId, pieces: list[Piece], report: object, moved: Callable[[], None]) -> str:
        stored = [PartPiece(p.tensor, "F32", p.shape, p.box, memoryview(p.data.numpy())) for p in pieces]
        return saving.write(run, version, worker, stored, lambda trouble: None, moved)

    return save


class SlowDisk:
    """What is written waits in memory for a sync, which takes seconds for every byte, by a clock of its own."""

    def __init__(self, seconds_a_byte: float, look: Callable[[], object]) -> None:
        self.now = 0.0
        self._seconds_a_byte, self._look = seconds_a_byte, look
        self._written: dict[int, int] = {}

    def monotonic(self) -> float:
        return self.now

    def sync_range(self, fd: int, start: int, stop: int, flags: int) -> int:
        if flags & 1:  # to wait
            self._write(fd, stop)
        return 0

    def sync(self, fd: int) -> None:
        self._write(fd, os.fstat(fd).st_size)

    def _write(self, fd: int, stop: int) -> None:
        file = os.fstat(fd).st_ino
        self.now += self._seconds_a_byte * max(0, stop - self._written.get(file, 0))
        self._written[file] = max(stop, self._written.get(file, 0))
        self._look()


@pytest.mark.parametrize("told", [True, False], ids=["ranges", "syncs"])
def test_a_slow_disk_is_not_taken_for_one_that_hangs(
    told: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To write all of it takes many times as long as anybody waits for a word: there is one for every window."""
    job = Tiny(tmp_path)(WorkerId("a"))
    job.save = part_of(tmp_path / "run")
    sent: queue.SimpleQueue[m.Event] = queue.SimpleQueue()
    saver, _ = begun(job, sent)
    waited: list[bool] = []
    window = 2048
    disk = SlowDisk(0.2 * STUCK_S / window, lambda: waited.append(saver.busy))
    monkeypatch.setattr("evenkeel.engine.saver.time", disk)
    monkeypatch.setattr("evenkeel.store.local.WINDOW_BYTES", window)
    monkeypatch.setattr("evenkeel.store.checkpoint_part.WRITE_BYTES", window)
    monkeypatch.setattr("evenkeel.store.local._sync_range", disk.sync_range if told else lambda *_: errno.ENOSYS)
    monkeypatch.setattr(os, "fdatasync", disk.sync)
    monkeypatch.setattr(os, "fsync", disk.sync)
    saver.copy(Version(1, 1), last=False)
    written = sent.get()
    saver.close()
    assert isinstance(written, m.PartWritten) and written.version == Version(1, 1)
    assert disk.now > 5 * STUCK_S
    assert all(waited), "it was taken for stuck"


class Breaking(LocalFiles):
    """A store that takes 100 s for each write, and breaks off the first file at its end."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.now, self.broken = 0.0, 0

    @contextmanager
    def stream(self, name: str) -> Iterator[Sink]:
        with super().stream(name) as sink:
            yield Slow(self, sink)
            if not self.broken:
                self.broken += 1
                raise StoreError(f"{name}: reset") from ConnectionResetError(errno.ECONNRESET, "reset")


@dataclass
class Slow:
    files: Breaking
    sink: Sink

    def write(self, data: bytes | memoryview) -> None:
        self.files.now += 100.0
        self.sink.write(data)


def test_a_part_that_breaks_off_after_a_long_time_is_written_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files, told = Breaking(tmp_path), list[Trouble]()
    again = partial(retrying, patience=Patience(first_s=0.001, most_s=0.001), clock=lambda: files.now)
    monkeypatch.setattr("evenkeel.runtime.saving.retrying", again)
    monkeypatch.setattr("evenkeel.runtime.saving.time", SimpleNamespace(monotonic=lambda: files.now))
    pieces = [PartPiece(f"param/{n}", "F32", (4,), Box((0,), (4,)), memoryview(bytes(16))) for n in range(5)]
    part = saving.write(RunDirectory(files), Version(3, 1), WorkerId("a"), pieces, told.append, lambda: None)
    assert [trouble.since_s for trouble in told] == [600.0] and files.broken == 1
    record = json.loads(part)["file"]
    assert files.sizes("checkpoints/step-00000003") == {record["name"]: record["size"]}
