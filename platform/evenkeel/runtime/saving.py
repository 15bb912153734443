"""What the processes of a run do in the store for its checkpoints: write a part, complete one, find one, read one."""

import json
import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from math import inf
from typing import TYPE_CHECKING, TypeVar

from evenkeel.control import messages as m
from evenkeel.core.batches import batches
from evenkeel.core.codec import dump, load
from evenkeel.core.ids import Version, WorkerId
from evenkeel.core.model import ModelShape
from evenkeel.plan.state import KINDS
from evenkeel.store.checkpoint_part import Part, Piece
from evenkeel.store.checkpoint_reader import Checkpoint, Want
from evenkeel.store.checkpoints import Checkpoints, folder
from evenkeel.store.errors import JournalFenced, StoreError
from evenkeel.store.lease import LeaseLost
from evenkeel.store.manifest import CheckpointDamaged, Content
from evenkeel.store.retry import Trouble, retrying
from evenkeel.store.run_directory import RunDirectory

if TYPE_CHECKING:
    from evenkeel.runtime.spec import RunSpec

T = TypeVar("T")

BATCH_BYTES = 64 << 20
"""Read in one go: so much that neighbours in a file are read together, so little that progress shows."""


def write(
    run: RunDirectory,
    version: Version,
    worker_id: WorkerId,
    pieces: Sequence[Piece],
    report: Callable[[Trouble], None],
    moved: Callable[[], None],
) -> str:
    """A worker's part, tried again while that may help, with a call of `moved` as often as it gets on.

    Returns what `complete` needs to know of it.

    Raises:
        StoreError: an error that does not pass, or not soon enough.
    """
    moved_at = -inf

    def note() -> None:
        nonlocal moved_at
        moved_at = time.monotonic()
        moved()

    attempt = partial(Checkpoints(run.files).write, version, worker_id, pieces, note)
    part = retrying(attempt, report, threading.Event().wait, moved_at=lambda: moved_at)
    return json.dumps(dump(part, Part), separators=(",", ":"))


def warn(error: StoreError) -> None:
    logging.warning("not all of older checkpoints could be removed: %s", error)


def complete(
    run: RunDirectory, spec: "RunSpec", command: m.CommitCheckpoint, untidy: Callable[[StoreError], None] = warn
) -> m.Event:
    """Makes a checkpoint visible whose parts are all there, and removes older ones.

    Args:
        untidy: is told why not all that is to be removed could be. The next checkpoint tries again.

    Raises:
        LeaseLost, JournalFenced: by a fenced directory: somebody else runs this run.
        StoreError: the checkpoint could not be made visible.
    """
    checkpoints = Checkpoints(run.files)
    content = Content(
        seed=spec.seed,
        samples=command.version.step * spec.global_batch,
        config=run.read_config() or "",
        layout=command.layout,
    )
    parts = [load(json.loads(part), Part) for part in command.parts]
    made = checkpoints.commit(command.version, content, parts, shapes(spec.policy.model), epoch=command.epoch)
    removed: list[int] = []
    try:
        checkpoints.prune(spec.keep, {command.version, *command.line}, command.agreed, removed.append)
    except (LeaseLost, JournalFenced):
        raise
    except StoreError as error:  # the checkpoint is complete all the same
        untidy(error)
    return m.CheckpointCommitted(command.version, sum(file.size for file in made.manifest.files), tuple(removed))


def find(run: RunDirectory) -> tuple[tuple[Version, ...], tuple[str, ...]]:
    """The versions of all checkpoints whose files are there, newest first; and a line for each of the others.

    Raises:
        StoreError: also for a checkpoint of a newer format.
    """
    good, damaged = Checkpoints(run.files).newest_first()
    return tuple(found.manifest.version for found in good), tuple(str(error) for error in damaged.values())


def read(run: RunDirectory, version: Version, wants: Sequence[Want], moved: Callable[[], None]) -> None:
    """Fills the buffers, and calls `moved` as often as it gets on.

    Raises:
        CheckpointDamaged: if the checkpoint of this very version is not there, is not as it was written, or a file of
            it cannot be read though its manifest can.
        ValueError: if it is of another model.
        StoreError: if the store fails, and not only for some of its files.
    """
    found = _open(run, version)
    for batch in batches(wants, lambda want: want.buffer.nbytes, BATCH_BYTES):
        moved()
        found, _ = _twice(run, found, partial(Checkpoint.read, wants=batch), moved)


def look(run: RunDirectory, command: m.LookAt) -> m.Looked:
    """What is wrong with a checkpoint, if anything, from where this process is.

    Raises:
        StoreError: if the store fails, and not only for some of its files.
    """
    error = ""
    try:
        found = _open(run, command.version)
        _, damaged = _twice(run, found, lambda it: next(it.damage(thorough=False, also=command.file), None))
        error = "" if damaged is None else str(damaged)
    except CheckpointDamaged as damage:
        error = str(damage)
    return m.Looked(command.version, command.file, error)


def _twice(
    run: RunDirectory, found: Checkpoint, use: Callable[[Checkpoint], T], moved: Callable[[], None] = lambda: None
) -> tuple[Checkpoint, T]:
    """What `use` finds in a checkpoint; after a failure of the store it is opened anew, and used once more.

    The store may have come back since; if not, though the manifest can be read, it is this checkpoint, for however
    long one waits.

    Raises:
        CheckpointDamaged: see `read`.
        StoreError: the manifest cannot be read either: the store as a whole is out of reach.
    """
    try:
        return found, use(found)
    except CheckpointDamaged:
        raise
    except StoreError:
        moved()
        found = _open(run, found.manifest.version)
    try:
        return found, use(found)
    except StoreError as error:
        damaged = CheckpointDamaged(str(error))
        damaged.file = error.file
        raise damaged from error


def _open(run: RunDirectory, version: Version) -> Checkpoint:
    found = Checkpoints(run.files).open(version.step)
    if found is None or found.manifest.version != version:
        there = "is gone" if found is None else f"is now that of generation {found.manifest.version.generation}"
        what = f"the checkpoint of step {version.step}, generation {version.generation}, {there}"
        raise CheckpointDamaged(f"{run.files.where(folder(version.step))}: {what}")
    return found


def shapes(model: ModelShape) -> Mapping[str, tuple[int, ...]]:
    """Of every tensor that a checkpoint holds, by its name "KIND/PARAMETER"."""
    return {f"{kind}/{p.name}": p.shape for layer in model.layers for p in layer.params for kind in KINDS}
