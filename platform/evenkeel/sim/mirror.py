"""A simulated worker's mirrors: its snapshots, and those that it keeps for others (rule 9)."""

from typing import TYPE_CHECKING

from evenkeel.core.boxes import Box
from evenkeel.core.ids import Generation, Version
from evenkeel.core.model import Shard
from evenkeel.core.world import World
from evenkeel.plan.mirrors import mirrors_of
from evenkeel.plan.state import Slice
from evenkeel.sim.memory import History, Snapshot

if TYPE_CHECKING:
    from evenkeel.sim.worker import SimWorker

SEND_S = (0.02, 0.15, 1.0)
"""Most virtual seconds that a snapshot is under way: much less than a step, about one, or several."""


class Mirrorer:
    """Sends and receives beside the training thread, which waits for no more than the snapshot of its own part."""

    def __init__(self, worker: "SimWorker") -> None:
        self.worker = worker

    def begin(self, world: World, version: Version) -> None:
        """Takes a snapshot of what the worker trains, which is of this version now, and sends it on its way."""
        worker, me = self.worker, self.worker.info.worker_id
        plan = mirrors_of(world, worker.memory.model)
        kept = [mirroring.shard for mirroring in plan.values() if mirroring.keeper == me]
        mine = plan.get(me)
        worker.member.begin_mirror(version, tuple(kept if mine is None else (mine.shard, *kept)))
        self._forget()
        worker.fleet.moment(worker, "mirroring")
        if mine is None or not worker.alive:
            return
        assert worker.member.held is not None
        contents = worker.memory.snapshot(worker.member.held.shard, mine.shard)
        self.take((version, mine.shard), contents)
        self._send((version, mine.shard), contents, worker.fleet.workers[mine.keeper].mirrorer)

    def _send(self, snapshot: Snapshot, contents: dict[Slice, History], keeper: "Mirrorer") -> None:
        """Until it has arrived, or one of the two has left the generation. It may come while they are leaving it."""
        fleet, generation = self.worker.fleet, self.worker.member.generation

        def arrive() -> None:
            generations = {self.worker.member.generation, keeper.worker.member.generation}
            if not (self.worker.alive and keeper.worker.alive) or generations != {generation}:
                return
            if keeper.expects(generation, snapshot[0]) and fleet.clock.now >= keeper.worker.hung_until:
                keeper.take(snapshot, contents)
                fleet.moment(keeper.worker, "mirrored")
            elif keeper.worker.member.running(generation):
                fleet.clock.after(0.02, arrive)

        fleet.clock.after(fleet.mirrored.uniform(0.0, fleet.mirrored.choice(SEND_S)), arrive)

    def expects(self, generation: Generation, version: Version) -> bool:
        """Whether it has begun to mirror this version in this generation."""
        return any((x.generation, x.version) == (generation, version) for x in self.worker.member.mirrors[-1:])

    def take(self, snapshot: Snapshot, contents: dict[Slice, History]) -> None:
        self.worker.memory.mirrors[snapshot] = contents
        self.worker.fleet.checks.mirrors.taken(self.worker, snapshot, contents)
        self.worker.member.mirrored(*snapshot)

    def read(self, version: Version, tensor: str, box: Box) -> History:
        """The bytes of a box of this version, as its mirrors have them."""
        held = [(version, shard) for shard in shards_of(self.worker, version)]
        return self.worker.memory.read_mirrored(held, tensor, box)

    def _forget(self) -> None:
        """Frees what the member has no mirror of any more; also what the next one is written over (rule 8)."""
        shards: set[Snapshot] = {(x.version, s) for x in self.worker.member.mirrors for s in x.held}
        self.worker.memory.mirrors = {k: c for k, c in self.worker.memory.mirrors.items() if k in shards}


def shards_of(worker: "SimWorker", version: Version) -> list[Shard]:
    """What a worker's mirrors hold of a version."""
    return [s for x in worker.member.mirrors if x.version == version for s in x.held]
