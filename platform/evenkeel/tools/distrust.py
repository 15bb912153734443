"""Checkpoints that the run itself does not go back to: copies of the state differed, and they may hold a wrong one.

Only the run's journal knows of them, and it knows them by their version, whenever their manifests come to be there. Of
checkpoints without a journal, copied or imported, nothing is known.
"""

from collections.abc import Callable, Mapping

from evenkeel.control.divergence import distrusted
from evenkeel.control.entries import Entry
from evenkeel.core.codec import CodecError, load
from evenkeel.core.ids import Version
from evenkeel.store.checkpoints import Checkpoints
from evenkeel.store.errors import StoreError
from evenkeel.store.files import Files
from evenkeel.store.journal import Journal
from evenkeel.store.manifest import CheckpointDamaged

FLAG = "--distrusted"
"""The option that takes them all the same."""

Distrust = Mapping[Version, str]
"""Why, in words, by the version of the checkpoint."""


def distrust_of(files: Files, anyway: bool, warn: Callable[[str], None]) -> Distrust:
    """What the journal of the run in this directory says; nothing if there is none.

    Args:
        anyway: they are taken all the same, so a journal that cannot be read is no reason to end.
        warn: is told of it then.

    Raises:
        StoreError: the journal cannot be read.
    """
    try:
        return distrusted([load(entry, Entry) for entry in Journal(files).read_all()])
    except (StoreError, CodecError) as error:
        where = "" if isinstance(error, StoreError) else f"{files.where('journal')}: "
        what = f"{where}{error}; so it is not known which checkpoints may hold a wrong copy of the state"
        if not anyway:
            raise StoreError(f"{what}; {FLAG} takes any") from None
        warn(what)
        return {}


def distrusted_steps(checkpoints: Checkpoints, distrust: Distrust) -> dict[int, str]:
    """Of those that are there and complete: why, by step, highest first. A step may have been made once more since."""
    found: dict[int, str] = {}
    for version, why in sorted(distrust.items(), reverse=True):
        try:
            checkpoint = checkpoints.open(version.step)
        except CheckpointDamaged:
            continue
        if checkpoint is not None and checkpoint.manifest.version == version:
            found[version.step] = why
    return found
