"""A world: a generation number, a layout, and what its members need to meet and to begin."""

from dataclasses import dataclass

from evenkeel.core.ids import Generation, NodeId, Version, WorkerId
from evenkeel.core.layout import Layout, WorkerInfo
from evenkeel.core.model import Shard

COMPARE_EVERY = 10
"""Steps between two votes that compare the copies of the state: to read all of it once in so many is little beside the
optimizer, which reads and writes it in every one."""


@dataclass(frozen=True, slots=True)
class Source:
    """Somebody who holds a shard of the version that a world begins from."""

    worker_id: WorkerId
    shard: Shard


@dataclass(frozen=True, slots=True)
class World:
    """Who trains together from now on, and from which state.

    Attributes:
        base: the version that everybody starts from; its step + 1 is the first step of this generation.
            At INITIAL nothing is moved: everybody initialises its shard, unless `saved`.
        members: by rank; rank 0 hosts the rendezvous store and is the leader, who reports.
        sources: holders of `base`, from whom missing slices come. Every member derives the same transfers from them. If
            `saved` they only keep what they hold, and need not be members.
        nodes: of members.
        last_step: train.steps; after committing it the world writes the final model and ends.
        saved: whoever does not hold its part of `base` reads it from the checkpoint of that version.
        copies: how many workers keep and update each element of the state; None: all that hold its parameter.
        checkpoint_every: steps between two checkpoints; 0: when one is asked for; None: there is no store for any.
        compare_every: every so many steps the vote compares the copies; see plan/comparison.py for when else.
        measure_every: every so many steps a vote tells what everybody has measured (plan/timing.py); None: none does.
        mirror_every: steps between two mirrors; None: nothing is mirrored. `base` is, at once, unless it is INITIAL.
        mirrored: the newest version of which the mirrors that are alive hold all: kept until a newer one is whole.
        bad_steps: how many steps up to `base` were skipped in a row as not finite.
        max_bad_steps: after so many in a row nobody goes on: the run has failed. None: whatever happens.
    """

    generation: Generation
    layout: Layout
    base: Version
    members: tuple[WorkerInfo, ...]
    sources: tuple[Source, ...]
    nodes: tuple[tuple[WorkerId, NodeId], ...]
    last_step: int
    cause: str
    reason: str
    saved: bool = False
    checkpoint_every: int | None = None
    copies: int | None = None
    compare_every: int = COMPARE_EVERY
    measure_every: int | None = None
    mirror_every: int | None = None
    mirrored: Version | None = None
    bad_steps: int = 0
    max_bad_steps: int | None = None

    @property
    def size(self) -> int:
        return len(self.members)

    @property
    def leader(self) -> WorkerId:
        return self.members[0].worker_id
