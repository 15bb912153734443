"""A worker's part of a checkpoint: copied between two steps, written while training goes on; and the way back."""

import queue
import threading
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from evenkeel.control import messages as m
from evenkeel.core.ids import Version, WorkerId
from evenkeel.core.layout import Layout
from evenkeel.engine.faults import Faults
from evenkeel.engine.job import Job, Piece
from evenkeel.engine.progress import Progress
from evenkeel.engine.state import ShardState
from evenkeel.engine.told import first_line, print_traceback
from evenkeel.plan.copies import Copies
from evenkeel.plan.state import KINDS
from evenkeel.plan.writers import Span, written_by

TELL_S = 20.0
"""Between two words that the writing of a part goes on; far below the controller's patience."""
SPARE = 1.05
"""By how much a buffer may be larger than what it is used for."""
STUCK_S = 120.0
"""Without any progress of the writing, before nobody waits for it any more."""


class Saver:
    """Every slice is written by one of its holders: this class knows which are this worker's.

    What takes time and memory is done by a thread of its own: finding the slices and making the buffers when a world
    begins, and writing. Only the copy into the buffers, between two steps, holds up the training.

    Args:
        send: takes PartWritten and PartFailed; must not block.
    """

    def __init__(self, worker_id: WorkerId, job: Job, faults: Faults, send: Callable[[m.Event], None]) -> None:
        self._id = worker_id
        self._job = job
        self._faults = faults
        self._send = send
        self._tasks: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._part: _Part | None = None
        self._ready = threading.Event()
        self._writing = False
        self._late = False
        self._moved_at = 0.0
        self._told: m.Event | None = None

    def begin(self, state: ShardState, layout: Layout, copies: Copies) -> None:
        """Makes ready to save this worker's part of what a world trains."""
        if self._part is not None and not self._late:
            self._part.forget()  # or the state of the world before would be kept for as long as it is being written
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="saver", daemon=True)
            self._thread.start()
        ready = self._ready = threading.Event()

        def prepare() -> None:
            try:
                spans = written_by(self._id, copies, layout, self._job.shape)
                part, self._part = self._part, None  # after an error nothing of another world is saved
                room = None if part is None else part.room
                del part
                if room is not None and not _fits(room, state, spans):
                    room = None  # gone before the next one is made
                self._part = _Part(state, spans, room)
            finally:
                ready.set()

        self._tasks.put(prepare)

    @property
    def busy(self) -> bool:
        """Whether the last copy is not written yet, so that its buffers may not be overwritten; but for a store that
        hangs: all others go on without it, and each checkpoint that it is asked for meanwhile fails."""
        return self._writing and not self._is_stuck

    @property
    def _is_stuck(self) -> bool:
        return time.monotonic() >= self._moved_at + STUCK_S

    def copy(self, version: Version, last: bool) -> None:
        """Copies this worker's part of the state, which has the version now, and has it written.

        Whether somebody is busy was voted on, so this worker is not, or was stuck then: it may have moved again since,
        and still has no room for another copy. Nobody asks about the last step: no later one changes its state, so that
        is copied when the buffers are free.

        Args:
            last: no step after this one is to be trained.
        """
        if last and self.busy:
            self._late = True
            self._tasks.put(lambda: self._copy_late(version))
            return
        if self._writing:
            what = f"what it wrote before is not done, and had made no progress for {STUCK_S:.0f} s"
            self._tell_part(m.PartFailed(self._id, version, what))
            return
        self._ready.wait()
        began = time.monotonic()
        pieces = self._take(version)
        if pieces is not None:
            stall_s = time.monotonic() - began
            self._tasks.put(lambda: self._write(version, pieces, stall_s))

    def _copy_late(self, version: Version) -> None:
        pieces = self._take(version)
        self._late = False
        if pieces is not None:
            self._write(version, pieces, 0.0)

    def _take(self, version: Version) -> Sequence[Piece] | None:
        """Copies its part, which is to be written now; None if that cannot be, which is said."""
        if self._part is None:
            what = "no memory to copy its part to, or an error: see its log"
            self._tell_part(m.PartFailed(self._id, version, what))
            return None
        self._part.copy()
        self._writing, self._moved_at = True, time.monotonic()
        return self._part.pieces

    def close(self) -> None:
        """Ends the thread, after what it is doing."""
        self._tasks.put(None)
        if self._thread is not None:
            self._thread.join()

    def _run(self) -> None:
        while (task := self._tasks.get()) is not None:
            try:
                task()
            except Exception:  # the border of the thread: whoever waits for its result finds that there is none
                print_traceback(self._job.clean)

    def _write(self, version: Version, pieces: Sequence[Piece], stall_s: float) -> None:
        assert self._job.save is not None
        over = threading.Event()
        threading.Thread(target=self._tell, args=(version, over), name="still-writing", daemon=True).start()
        try:
            self._faults.fire("write", version.step)
            written = self._job.save(version, self._id, pieces, self._troubled, self._moved)
            self._faults.fire("written", version.step)
        except Exception as error:  # the border to the store and to threads: a checkpoint that fails is an event
            text = first_line(str(error), self._job.clean) or type(error).__name__
            event: m.Event = m.PartFailed(self._id, version, text)
        else:
            event = m.PartWritten(self._id, version, written, stall_s)
        over.set()
        self._writing = False
        self._tell_part(event)

    def _tell_part(self, event: m.Event) -> None:
        self._told = event
        self._send(event)

    def tell_again(self) -> None:
        """What became of its last part, to a new life of the controller: the one that has heard it may be gone before
        the step was durably visible. From any thread."""
        if self._told is not None:
            self._send(self._told)

    def _tell(self, version: Version, over: threading.Event) -> None:
        told = self._moved_at
        while not over.wait(TELL_S):
            if self._moved_at > told:
                told = self._moved_at
                self._send(m.StillWriting(self._id, version))

    def _moved(self) -> None:
        self._moved_at = time.monotonic()

    def _troubled(self, error: str) -> None:
        """It is tried again, though not for ever."""
        self._moved()
        self._send(m.StorageTrouble(self._id, self._job.clean(error)))


def load(job: Job, version: Version, state: ShardState, progress: Progress) -> None:
    """Fills all of a shard from the checkpoint of a version.

    Raises:
        CheckpointError: if it cannot be read as it was written.
        AbortedError: if the generation is not to go on.
    """
    assert job.load is not None
    views = list(state.pieces())
    # On the CPU they are the very same memory.
    pieces = [Piece(name, state.shape(name), box, view.cpu()) for name, box, view in views]
    job.load(version, pieces, progress.moved)
    for (_, _, view), piece in zip(views, pieces, strict=True):
        view.copy_(piece.data)
    state.publish()


def _size(spans: Sequence[Span]) -> int:
    """Elements of what is written of these."""
    return len(KINDS) * sum(span.stop - span.start for span in spans)


def _fits(room: Tensor, state: ShardState, spans: Sequence[Span]) -> bool:
    """Whether there is room for that, and not much more."""
    size = _size(spans)
    return room.dtype == state.params.dtype and size <= room.numel() <= SPARE * size


class _Part:
    """The ranges of a shard's flat buffers that one worker writes, and room on the host for a copy of them.

    Args:
        room: of an earlier part, which fits.
    """

    def __init__(self, state: ShardState, spans: Sequence[Span], room: Tensor | None) -> None:
        sources = [(kind, state.range(kind, span.start, span.stop), span) for kind in KINDS for span in spans]
        if room is None:
            # Written to once, so that its pages are there when the training waits for the copy.
            pinned = state.params.device.type == "cuda"
            room = torch.zeros(_size(spans), dtype=state.params.dtype, pin_memory=pinned)
        self.room = room
        self._device = state.params.device
        self._copies: list[tuple[Tensor, Tensor]] = []
        self.pieces: list[Piece] = []
        at = 0
        for kind, source, span in sources:
            target = room[at : at + source.numel()]
            self._copies.append((target, source))
            at += source.numel()
            for piece in span.pieces:
                first = piece.start - span.start
                data = target[first : first + piece.box.size]
                self.pieces.append(Piece(f"{kind}/{piece.param.name}", piece.param.shape, piece.box, data))

    def forget(self) -> None:
        """The state that it is copied from: nothing more will be."""
        self._copies.clear()

    def copy(self) -> None:
        for target, source in self._copies:
            target.copy_(source, non_blocking=True)
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
