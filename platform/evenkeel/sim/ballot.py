"""What a simulated worker puts into a vote: what is summed, requests, and checksums of what it holds."""

from typing import TYPE_CHECKING
from zlib import crc32

from evenkeel.core.model import ModelShape
from evenkeel.core.vote import SLOTS, Slot, Timing, put_flags
from evenkeel.core.world import World
from evenkeel.plan import timing
from evenkeel.plan.comparison import Compared, checksums, compared
from evenkeel.plan.copies import copies_of, group_places
from evenkeel.plan.flat import ALIGNMENT
from evenkeel.plan.state import Slice
from evenkeel.sim.memory import History

if TYPE_CHECKING:
    from evenkeel.sim.worker import SimWorker

TOKENS = 8.0
"""Of a micro-batch."""


def cast(worker: "SimWorker", world: World) -> tuple[float, ...]:
    """Its part of the vote of its step."""
    sums = checksums(parts(worker), worker.info.worker_id, lambda part: _checksum(worker, part))
    told = timing.slots(world, worker.pace.timing(world)) if worker.member.measures(worker.step) else ()
    return (*_values(worker, 1, _tokens(worker, world)), *sums, *told)


def lie(worker: "SimWorker", world: World) -> tuple[float, ...]:
    """What an abort may leave in its place: a sum that looks complete (rule 2), and is another."""
    values = _values(worker, world.size, TOKENS * world.layout.micro_batches)
    values[Slot.GRAD_SQUARES] = -1.0
    told = timing.slots(world, Timing(worker.info.worker_id)) if worker.member.measures(worker.step) else ()
    return (*values, *(1.0 for part in parts(worker) for _ in part.owners), *(1.0 for _ in told))


def _tokens(worker: "SimWorker", world: World) -> float:
    """What it has to count: one TP rank of each pipeline's last stage has the loss of its share."""
    place = world.layout.places[worker.info.worker_id]
    pipeline = world.layout.pipelines[place.pipeline]
    counts = place.stage == len(pipeline.stages) - 1 and place.tp == 0
    return TOKENS * pipeline.share if counts else 0.0


def _values(worker: "SimWorker", ones: int, tokens: float) -> list[float]:
    values = [0.0] * SLOTS
    values[Slot.ONES] = ones
    values[Slot.STEP] = worker.step * ones
    values[Slot.TOKENS] = tokens
    values[Slot.LOSS] = 2.0 * tokens
    values[Slot.NONFINITE] = float(worker.fleet.rng.random() < worker.fleet.scenario.nonfinite)
    put_flags(values, worker.member.flags(worker.step))
    values[Slot.BUSY] = float(worker.member.busy(worker.step, worker.writer.busy))
    values[Slot.MIRRORING] = float(worker.member.mirroring)
    return values


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
