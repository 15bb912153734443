"""What is said of checkpoints in the store: their parts, their completion, and what cannot be read of one."""

from dataclasses import dataclass

from evenkeel.core.ids import Generation, Version, WorkerId
from evenkeel.core.layout import Layout

# ---------------------------------------------------------------- events


@dataclass(frozen=True, slots=True)
class PartWritten:
    """A worker's part of a checkpoint is durable. `part` describes it, as JSON text, for the manifest; copying it has
    held up the training for `stall_s`."""

    worker_id: WorkerId
    version: Version
    part: str
    stall_s: float = 0.0


@dataclass(frozen=True, slots=True)
class PartFailed:
    """A worker could not write its part, though it tried for a while."""

    worker_id: WorkerId
    version: Version
    error: str


@dataclass(frozen=True, slots=True)
class StillWriting:
    """A part takes its time; its worker lives and is at it. Told every so many seconds."""

    worker_id: WorkerId
    version: Version


@dataclass(frozen=True, slots=True)
class CheckpointCommitted:
    """A CommitCheckpoint is done: the manifest is there. `bytes` is the size of its files.

    `removed` are the steps of older checkpoints that were cleaned up after it.
    """

    version: Version
    bytes: int
    removed: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class CheckpointFailed:
    """A CommitCheckpoint could not be done."""

    version: Version
    error: str


@dataclass(frozen=True, slots=True)
class CheckpointUnreadable:
    """The world's base was to be read from its checkpoint, but to this worker a file is damaged or missing: `file`, by
    its name in the checkpoint's folder; "" for the manifest. The worker has parked."""

    worker_id: WorkerId
    generation: Generation
    version: Version
    error: str
    file: str = ""


@dataclass(frozen=True, slots=True)
class Looked:
    """A LookAt is done: `error` says what is wrong with the checkpoint, "" if that is nothing."""

    version: Version
    file: str
    error: str = ""


# ---------------------------------------------------------------- commands


@dataclass(frozen=True, slots=True)
class CommitCheckpoint:
    """All parts of a checkpoint are durable: write its manifest, which makes it visible, and clean up older ones. Those
    of `line` can be gone back to, others need not stay; `agreed` is the newest whose copies are known to be equal."""

    version: Version
    epoch: int
    layout: Layout
    parts: tuple[str, ...]
    line: tuple[Version, ...]
    agreed: Version | None = None


@dataclass(frozen=True, slots=True)
class LookAt:
    """See, from where the controller is, whether this checkpoint is there with all of its files, each of its size, and
    whether all bytes of `file` are as they were written, unless that is ""."""

    version: Version
    file: str = ""
