"""The checkpoint that a command means."""

from collections.abc import Callable

from evenkeel.store.checkpoint_reader import Checkpoint
from evenkeel.store.checkpoints import FOLDER, Checkpoints
from evenkeel.store.errors import StoreError
from evenkeel.store.files import Files
from evenkeel.store.manifest import CheckpointDamaged


def checkpoints_of(files: Files) -> Checkpoints:
    """Raises StoreError where neither a run nor a checkpoint is: most likely the path is mistyped."""
    found = Checkpoints(files)
    if not found.steps() and files.read("run.json") is None:
        raise StoreError(f"{files.where()}: no run here (there is neither run.json nor a folder {FOLDER}/)")
    return found


def choose(files: Files, step: int | None, warn: Callable[[str], None]) -> Checkpoint:
    """The complete checkpoint of that step; for None the newest whose files are all there.

    Args:
        warn: is told of a later one that is passed over.

    Raises:
        StoreError: if there is none; names the steps that there are.
        CheckpointDamaged: if its manifest is, or all there are.
    """
    checkpoints = checkpoints_of(files)
    if step is not None:
        found = checkpoints.open(step)
        if found is None:
            raise StoreError(f"{files.where()}: no complete checkpoint of step {step}; {_there(checkpoints)}")
        return found
    good, damaged = checkpoints.newest_first()
    if good:
        chosen = good[0].manifest.version.step
        for later in (at for at in sorted(damaged) if at > chosen):
            warn(f"step {later} is damaged, so step {chosen} is taken: {damaged[later]}")
        return good[0]
    if damaged:
        raise damaged[max(damaged)]
    raise StoreError(f"{files.where()}: no complete checkpoint; {_there(checkpoints)}")


def _there(checkpoints: Checkpoints) -> str:
    complete = []
    for step in checkpoints.steps():
        try:
            complete += [str(step)] if checkpoints.open(step) else []
        except CheckpointDamaged:
            continue
    return f"there are those of steps {', '.join(complete)}" if complete else "there is none"
