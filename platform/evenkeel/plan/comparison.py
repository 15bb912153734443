"""Which copies of the state a vote compares, and when: a pure function of the world, so that all members agree.

Every owner of a part adds a checksum of its copy to the vote, in a slot of its own; so everybody reads everybody's, in
the all-reduce that is there anyway. What only one worker keeps has nothing to be compared with, and costs nothing.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from evenkeel.core.ids import WorkerId
from evenkeel.core.layout import SyncGroup
from evenkeel.core.vote import SLOTS, Difference, Vote
from evenkeel.core.world import World
from evenkeel.plan.copies import Copies, Ownership


@dataclass(frozen=True, slots=True)
class Compared:
    """What the same workers keep of a sync group's state, several of them.

    Attributes:
        ranges: elements (start, stop), counted from the group's first element.
        owners: in order of the group's members.
    """

    name: str
    group: SyncGroup
    ranges: tuple[tuple[int, int], ...]
    owners: tuple[WorkerId, ...]


def compared(world: World, copies: Copies) -> tuple[Compared, ...]:
    """All parts that more than one worker keeps; the same in every member.

    Args:
        copies: plan.copies.copies_of the world.
    """
    found: list[Compared] = []
    for ownership in copies.groups:
        owned = _owned(ownership, everybody=world.copies is None)
        for number, (owners, ranges) in enumerate(owned.items(), 1):
            if len(owners) > 1:
                name = ownership.group.name if len(owned) == 1 else f"{ownership.group.name}.{number}of{len(owned)}"
                found.append(Compared(name, ownership.group, tuple(ranges), owners))
    return tuple(found)


def _owned(ownership: Ownership, everybody: bool) -> dict[tuple[WorkerId, ...], list[tuple[int, int]]]:
    """Ranges by who owns them; `everybody` if that is every member, whatever the ownership says."""
    members = ownership.group.members
    if everybody:
        return {members: [(0, ownership.size)]}
    ranges: dict[tuple[WorkerId, ...], list[tuple[int, int]]] = {}
    for part in ownership.parts:
        owners = tuple(worker for worker in members if worker in part.owners)
        ranges.setdefault(owners, []).append((part.start, part.stop))
    return ranges


def due(world: World, step: int, before: Vote | None) -> bool:
    """Whether the vote of a step compares the copies of the version that the step begins from.

    It does so in the first step of a generation, as these copies were moved or read; every world.compare_every steps;
    after a step that was saved, so that a checkpoint is known to be of a version whose copies agreed once a later step
    is committed; and in the last step.

    Args:
        before: the vote of the step before, if that was of this generation.
    """
    first = step == world.base.step + 1
    saved = before is not None and before.saves
    return first or saved or step == world.last_step or step % world.compare_every == 0


def checksums(parts: Sequence[Compared], worker: WorkerId, checksum: Callable[[Compared], int]) -> Iterator[float]:
    """A worker's slots of a vote that compares these parts, which come after its values.

    Args:
        checksum: of the worker's copy of a part; from 1 up to below 2^53, so that a float64 holds it exactly.
    """
    for part in parts:
        for owner in part.owners:
            yield float(checksum(part)) if owner == worker else 0.0


def read_vote(generation: int, step: int, summed: Sequence[float], parts: Sequence[Compared]) -> Vote:
    """The vote that the sum of everybody's slots is. With a checksum missing it is an incomplete one (rule 2).

    Args:
        parts: that it compares; none if it compares nothing.
    """
    values, sums = tuple(summed[:SLOTS]), summed[SLOTS:]
    if 0.0 in sums or len(sums) != sum(len(part.owners) for part in parts):
        return Vote(generation, step, ())
    return Vote(generation, step, values, tuple(_differences(sums, parts)))


def _differences(sums: Sequence[float], parts: Sequence[Compared]) -> Iterator[Difference]:
    at = 0
    for part in parts:
        theirs = sums[at : at + len(part.owners)]
        at += len(part.owners)
        held = tuple((owner, int(checksum)) for owner, checksum in zip(part.owners, theirs, strict=True))
        if len({checksum for _, checksum in held}) > 1:
            yield Difference(part.name, held)
