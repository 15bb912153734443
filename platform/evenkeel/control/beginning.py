"""Where a run begins, in its first life or because the user says so.

A checkpoint of generation 0 was put into the run directory: no world has made it. The first world begins from it, and
so it stands for the beginning from then on, instead of what the seed gives. There is no going on without it: a worker
that has read its part of weights of step 0 and one that has made its own would both hold "version (0, 0)".
"""

from evenkeel.control import saving
from evenkeel.control.state import State
from evenkeel.core.ids import IMPORTED, INITIAL, Version
from evenkeel.core.world import World


def import_of(world: World) -> Version | None:
    """The checkpoint that was put into the run directory, if this world reads one."""
    return world.base if world.saved and world.base.generation == IMPORTED else None


def opened(s: State, world: World) -> None:
    """A world begins; also where the journal is replayed."""
    s.imported = import_of(world) or s.imported


def choose(s: State) -> None:
    """Goes back to what the user asks for; before the first world to what was put here, if anything was.

    Ends the run if that cannot be: a damaged checkpoint here says that it was not to begin from random weights.
    """
    new = s.generation == 0
    if new and s.saved:
        s.generation = s.saved[0].generation  # above 0 only if a journal was lost; no number is used twice (rule 15)
    if s.resume is not None:
        base, s.resume = s.resume, None
        if base in s.distrusted:
            s.end("failed", f"copies of step {base.step} differed, so that its checkpoint may hold a wrong one")
            return
        if base != INITIAL:
            s.saved = saving.newest_first([*s.saved, base])  # it may be of a line that was given up until now
        saving.go_back(s, base, f"asked to go on from step {base.step}")
    elif new and s.saved and not s.restores:
        newest = ", the newest that can be read" if s.damaged else ""
        saving.go_back(s, s.saved[0], f"a checkpoint of step {s.saved[0].step} was put here to begin from{newest}")
    elif new and s.damaged and not s.saved:
        what = f"what was put here to begin from cannot be read: {'; '.join(s.damaged)}"
        s.end("failed", f"{what}; {saving.ANOTHER}, or remove its folder to begin without it")


def is_lost(s: State) -> bool:
    """Whether the run is at its beginning, which are weights that were put here, and these are not there any more."""
    return s.committed == INITIAL == s.imported and INITIAL not in s.saved
