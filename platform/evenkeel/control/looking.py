"""A second look at a checkpoint, from where the controller is, before the run goes back past it.

To go back is for ever: what is newer than the base is not of the run's line any more, in no later life. But what one
worker says of a checkpoint may be the worker's trouble: the store is not mounted on its node, or its memory is bad. And
a manifest whose writing failed is there all the same if only the answer was lost. So nothing of that is believed, nor
written down, before the controller's own process has looked. No world is formed meanwhile. A look that is lost with the
controller is asked for again by what led to it.
"""

from collections.abc import Mapping

from evenkeel.control import messages as m
from evenkeel.control import saving
from evenkeel.control.state import State
from evenkeel.core.ids import Version, WorkerId


def unreadable(s: State, event: m.CheckpointUnreadable) -> None:
    """What a worker of the newest world could not read; several who could not read the same share one look."""
    counts = event.worker_id in s.roster.alive and event.generation == s.generation
    if not counts or event.version not in s.saved:
        return
    told = _look(s, event.version, event.file)
    if event.worker_id not in told:
        s.log("checkpoint_unreadable", worker_id=event.worker_id, checkpoint=event.version.step, error=event.error)
    told[event.worker_id] = event.error


def newer_than(s: State, base: Version) -> bool:
    """Whether there may be a checkpoint newer than `base` whose manifest was said not to be written. Each is looked at,
    once."""
    newer = [
        version
        for version in sorted(s.unsure - s.distrusted)
        if saving.newest_first([version, base])[0] != base and saving.in_line(s, version)
    ]
    s.unsure.difference_update(newer)
    for version in newer:
        _look(s, version, "")
    return bool(newer)


def answered(s: State, event: m.Looked) -> Mapping[WorkerId, str]:
    """What became of a look; one that nobody waits for changes nothing.

    Returns:
        Who could not read what is whole, and what each said.
    """
    version = event.version
    told = s.looks.pop((version, event.file), None)
    if told is None:
        return {}
    if not event.error:
        if not told:
            saving.found(s, version)
        return told
    saving.damaged(s, version, event.error)
    for other in [key for key in s.looks if key[0] == version]:
        del s.looks[other]  # whoever asked for it has been answered
    return {}


def waits_for(s: State) -> str:
    """In words."""
    steps = sorted({version.step for version, _ in s.looks})
    return f"a second look at the checkpoint of step {', '.join(map(str, steps))}"


def _look(s: State, version: Version, file: str) -> dict[WorkerId, str]:
    if (version, file) not in s.looks:
        s.looks[version, file] = {}
        s.say(m.LookAt(version, file))
    return s.looks[version, file]
