"""Which checkpoints a run has, and in what state each is."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from evenkeel.store.checkpoints import Checkpoints, folder
from evenkeel.store.errors import StoreError
from evenkeel.store.files import Files
from evenkeel.store.manifest import CheckpointDamaged, part_generation
from evenkeel.store.run_directory import RunDirectory
from evenkeel.store.untrusted import LATEST
from evenkeel.tools.distrust import Distrust
from evenkeel.tools.text import size_text, time_text

State = Literal["complete", "distrusted", "damaged", "half-written", "unreadable"]
HEAD = ("step", "generation", "time", "size", "files", "state")
RIGHT = ("step", "generation", "size", "files")


@dataclass(frozen=True, slots=True)
class Listed:
    """One checkpoint, as far as can be told without reading its tensors.

    Attributes:
        generation: of the world that made the state; None where neither manifest nor files say it.
        time: of the commit, unix seconds, from the run's events; None if unknown.
        bytes, files: what lies in its folder, of a whole one without the manifest.
        why: it is in that state, in one line; "" if it is complete.
    """

    step: int
    generation: int | None
    time: float | None
    bytes: int
    files: int
    state: State
    why: str


def listing(directory: RunDirectory, checkpoints: Checkpoints, distrust: Distrust) -> list[Listed]:
    """Newest first, as a run takes them: by generation, then by step."""
    times = commit_times(directory)
    found = [_look(directory.files, checkpoints, step, times, distrust) for step in checkpoints.steps()]
    return sorted(found, key=lambda row: (-1 if row.generation is None else row.generation, row.step), reverse=True)


def commit_times(directory: RunDirectory) -> dict[int, float]:
    """When the checkpoint of which step was committed, by the run's events; of a step that was redone the last time."""
    times: dict[int, float] = {}
    for event in directory.events():
        step, time = event.get("checkpoint"), event.get("time")
        if event.get("event") != "checkpoint_committed" or not isinstance(step, int):
            continue
        if isinstance(time, int | float) and 0 <= time < LATEST:
            times[step] = float(time)
    return times


def row(listed: Listed) -> tuple[str, ...]:
    """What stands under HEAD."""
    generation = "-" if listed.generation is None else str(listed.generation)
    state = f"{listed.state}: {listed.why}" if listed.why else listed.state
    size = size_text(listed.bytes)
    return str(listed.step), generation, time_text(listed.time), size, str(listed.files), state


def _look(files: Files, checkpoints: Checkpoints, step: int, times: Mapping[int, float], distrust: Distrust) -> Listed:
    try:
        looked = checkpoints.look(step, thorough=False)
    except CheckpointDamaged as error:
        return _without_manifest(files, step, "damaged", str(error))
    except StoreError as error:
        return _without_manifest(files, step, "unreadable", str(error))
    if looked is None:
        why = "it has no manifest: it is being written, or its writer died"
        return _without_manifest(files, step, "half-written", why)
    checkpoint, damage = looked
    at, records = checkpoint.manifest.version, checkpoint.manifest.files
    why = str(damage[0]) if damage else distrust.get(at, "")
    return Listed(
        step=at.step,
        generation=at.generation,
        time=times.get(at.step),
        bytes=sum(record.size for record in records),
        files=len(records),
        state="damaged" if damage else "distrusted" if why else "complete",
        why=why,
    )


def _without_manifest(files: Files, step: int, state: State, why: str) -> Listed:
    sizes = files.sizes(folder(step))
    generations = [generation for name in sizes if (generation := part_generation(name)) is not None]
    return Listed(step, max(generations, default=None), None, sum(sizes.values()), len(sizes), state, why)
