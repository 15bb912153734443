"""What a simulated worker adds to a vote that compares copies: checksums of what it holds."""

from collections.abc import Iterator
from typing import TYPE_CHECKING
from zlib import crc32

from evenkeel.core.model import ModelShape
from evenkeel.core.world import World
from evenkeel.plan.comparison import Compared, checksums, compared
from evenkeel.plan.copies import copies_of, group_places
from evenkeel.plan.flat import ALIGNMENT
from evenkeel.plan.state import Slice
from evenkeel.sim.memory import History

if TYPE_CHECKING:
    from evenkeel.sim.worker import SimWorker


def compared_in(world: World, model: ModelShape) -> dict[Compared, frozenset[str]]:
    """The parts that votes of a world compare, each with the names of its parameters.

    No range ends within a parameter, as these are smaller than the alignment here.
    """
    found: dict[Compared, frozenset[str]] = {}
    for part in compared(world, copies_of(world, model)):
        places = group_places(model, part.group, world.layout.tensor, ALIGNMENT)
        found[part] = frozenset(p.param.name for p in places if any(a <= p.start < b for a, b in part.ranges))
    return found


def parts(worker: "SimWorker") -> tuple[Compared, ...]:
    """What the vote of the worker's step compares."""
    return tuple(worker.compared) if worker.member.compares(worker.step) else ()


def sums(worker: "SimWorker") -> Iterator[float]:
    """Its slots of that vote."""
    return checksums(parts(worker), worker.info.worker_id, lambda part: _checksum(worker, part))


def contents_of(worker: "SimWorker", part: Compared) -> dict[Slice, History]:
    """A worker's copy of a part."""
    held = worker.member.held
    assert held is not None
    names = worker.compared[part]
    contents = worker.memory.shards[held.shard]
    return {piece: history for piece, history in contents.items() if piece.tensor.partition("/")[2] in names}


def _checksum(worker: "SimWorker", part: Compared) -> int:
    """Where no bit can flip all copies are the same, and what they are need not be worked out."""
    if not worker.fleet.scenario.flips:
        return 1
    return 1 + crc32(repr(sorted(contents_of(worker, part).items())).encode())
