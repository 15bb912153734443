"""The checkpoint that a command means."""

from collections.abc import Callable

from evenkeel.store.checkpoint_reader import Checkpoint
from evenkeel.store.checkpoints import FOLDER, Checkpoints
from evenkeel.store.errors import StoreError
from evenkeel.store.files import Files
from evenkeel.store.manifest import CheckpointDamaged
from evenkeel.tools.distrust import FLAG, Distrust

NO_OTHER = "there is no other"


def checkpoints_of(files: Files) -> Checkpoints:
    """Raises StoreError where neither a run nor a checkpoint is: most likely the path is mistyped."""
    found = Checkpoints(files)
    if not found.steps() and files.read("run.json") is None:
        raise StoreError(f"{files.where()}: no run here (there is neither run.json nor a folder {FOLDER}/)")
    return found


def choose(files: Files, step: int | None, distrust: Distrust, warn: Callable[[str], None]) -> Checkpoint:
    """The complete checkpoint of that step; for None the newest whose files are all there.

    Args:
        distrust: what is not taken.
        warn: is told of a later one that is passed over.

    Raises:
        StoreError: if there is none; names the steps that there are. Or it is distrusted.
        CheckpointDamaged: if its manifest is, or all there are.
    """
    checkpoints = checkpoints_of(files)
    if step is not None:
        return _of_step(files, checkpoints, step, distrust)
    good, damaged = checkpoints.newest_first()
    trusted = [found for found in good if found.manifest.version not in distrust]
    if trusted:
        chosen = trusted[0].manifest.version.step
        for later in (at for at in sorted(damaged) if at > chosen):
            warn(f"step {later} is damaged, so step {chosen} is taken: {damaged[later]}")
        for version in (found.manifest.version for found in good[: good.index(trusted[0])]):
            warn(f"step {version.step} is distrusted, so step {chosen} is taken: {distrust[version]}")
        return trusted[0]
    if good:
        raise _distrusted(good[0], distrust[good[0].manifest.version], NO_OTHER)
    if damaged:
        raise damaged[max(damaged)]
    raise StoreError(f"{files.where()}: no complete checkpoint; {_there(checkpoints, distrust)}")


def _of_step(files: Files, checkpoints: Checkpoints, step: int, distrust: Distrust) -> Checkpoint:
    found = checkpoints.open(step)
    if found is None:
        there = _there(checkpoints, distrust)
        raise StoreError(f"{files.where()}: no complete checkpoint of step {step}; {there}")
    why = distrust.get(found.manifest.version)
    if why is not None:
        raise _distrusted(found, why, _there(checkpoints, distrust, NO_OTHER))
    return found


def _distrusted(checkpoint: Checkpoint, why: str, there: str) -> StoreError:
    return StoreError(f"{checkpoint.url}: is distrusted: {why}; {there}; {FLAG} takes it all the same")


def _there(checkpoints: Checkpoints, distrust: Distrust, none: str = "there is none") -> str:
    """Which could be taken instead."""
    complete = []
    for step in checkpoints.steps():
        try:
            found = checkpoints.open(step)
        except CheckpointDamaged:
            continue
        if found is not None and found.manifest.version not in distrust:
            complete.append(str(step))
    return f"there are those of steps {', '.join(complete)}" if complete else none
