"""A worker's part of a checkpoint: copied between two steps, written while training goes on; and the way back."""

import queue
import threading
import traceback
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
from evenkeel.plan.copies import Copies
from evenkeel.plan.state import KINDS
from evenkeel.plan.writers import Span, written_by

TELL_S = 20.0
"""Between two words that a part is still being written; far below the controller's patience."""


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
        self.busy = False
        """Whether the last copy is not written yet, so that its buffers may not be overwritten."""

    def begin(self, state: ShardState, layout: Layout, copies: Copies) -> None:
        """Makes ready to save this worker's part of what a world trains."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="saver", daemon=True)
            self._thread.start()
        ready = self._ready = threading.Event()

        def prepare() -> None:
            try:
                room = None if self._part is None else self._part.room
                self._part = None  # so that after an error nothing of another world is saved
                spans = written_by(self._id, copies, layout, self._job.shape)
                self._part = _Part(state, spans, room)
            finally:
                ready.set()

        self._tasks.put(prepare)

    def copy(self, version: Version) -> None:
        """Copies this worker's part of the state, which has the version now, and has it written.

        Whether somebody is busy was voted on, so this worker is not; but for the last step, which nobody asks about: no
        later one changes its state, so that is copied when the buffers are free.
        """
        self._ready.wait()
        part = self._part
        if part is None:
            self._send(m.PartFailed(self._id, version, "no memory to copy its part to, or an error: see its log"))
            return
        if self.busy:
            self._tasks.put(part.copy)
        else:
            part.copy()
            self.busy = True
        self._tasks.put(lambda: self._write(version, part))

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
                traceback.print_exc()

    def _write(self, version: Version, part: "_Part") -> None:
        assert self._job.save is not None
        over = threading.Event()
        threading.Thread(target=self._tell, args=(version, over), name="still-writing", daemon=True).start()
        try:
            self._faults.fire("write", version.step)
            written = self._job.save(version, self._id, part.pieces, self._troubled)
            self._faults.fire("written", version.step)
        except Exception as error:  # the border to the store and to threads: a checkpoint that fails is an event
            text = str(error).splitlines()[0] if str(error) else ""
            event: m.Event = m.PartFailed(self._id, version, text or type(error).__name__)
        else:
            event = m.PartWritten(self._id, version, written)
        over.set()
        self.busy = False
        self._send(event)

    def _tell(self, version: Version, over: threading.Event) -> None:
        while not over.wait(TELL_S):
            self._send(m.StillWriting(self._id, version))

    def _troubled(self, error: str) -> None:
        self._send(m.StorageTrouble(self._id, error))


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


class _Part:
    """The ranges of a shard's flat buffers that one worker writes, and room on the host for a copy of them.

    Args:
        room: of an earlier part, which is used again if it is large enough and of the right type.
    """

    def __init__(self, state: ShardState, spans: Sequence[Span], room: Tensor | None) -> None:
        sources = [(kind, state.range(kind, span.start, span.stop), span) for kind in KINDS for span in spans]
        size = sum(source.numel() for _, source, _ in sources)
        if room is None or room.numel() < size or room.dtype != state.params.dtype:
            # Written to once, so that its pages are there when the training waits for the copy.
            room = torch.zeros(size, dtype=state.params.dtype, pin_memory=state.params.device.type == "cuda")
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

    def copy(self) -> None:
        for target, source in self._copies:
            target.copy_(source, non_blocking=True)
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
