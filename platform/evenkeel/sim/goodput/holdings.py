"""What each worker holds of the state, by reference: most hold the same, and all of a world change together."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import inf, prod

from evenkeel.control.parts import Held
from evenkeel.core.ids import INITIAL, Generation, Version, WorkerId
from evenkeel.core.model import ModelShape, Shard
from evenkeel.core.world import World
from evenkeel.plan.copies import shards_in
from evenkeel.plan.mirrors import mirrors_of
from evenkeel.plan.state import KINDS

STATE_BYTES = len(KINDS) * 4
"""Of one element of the state: the parameter and both moments, in float32 (plan/memory.py)."""

NOTHING: tuple[Held, ...] = ()


@dataclass
class Mirrors:
    """One version in host memory: of each holder its own snapshot first, then those that it keeps for others.

    Attributes:
        whole_at: when the last byte of those for others has arrived; their own the holders have at once.
    """

    generation: Generation
    version: Version
    shards: dict[WorkerId, tuple[Shard, ...]]
    owners: Collection[WorkerId]
    whole_at: float

    def of(self, worker: WorkerId, now: float) -> tuple[Shard, ...]:
        shards = self.shards.get(worker, ())
        if now >= self.whole_at:
            return shards
        return shards[:1] if worker in self.owners else ()


class Holdings:
    """As each Member would tell it (control/member.py), of workers whose messages all arrive.

    Attributes:
        state_bytes: of all of the state, once.
        mirroring_until: when the last mirror is whole.
    """

    def __init__(self, model: ModelShape, parts: int) -> None:
        """Args: parts: how many devices a worker stands for, each with as large a part of its shard."""
        self._model = model
        self._parts = parts
        self._trained: dict[WorkerId, tuple[Held, ...]] = {}
        self._mirrors: list[Mirrors] = []
        self._shards: Mapping[WorkerId, Shard] = {}
        self._elements = [sum(prod(param.shape) for param in layer.params) for layer in model.layers]
        self.state_bytes = STATE_BYTES * sum(self._elements)
        self.mirroring_until = 0.0

    def of(self, workers: Iterable[WorkerId], now: float) -> dict[WorkerId, tuple[Held, ...]]:
        """What each of these holds, the current shard first."""
        trained = self._trained
        if not self._mirrors:
            return {worker: trained.get(worker, NOTHING) for worker in workers}
        return {worker: (*trained.get(worker, NOTHING), *self._mirrored(worker, now)) for worker in workers}

    def _mirrored(self, worker: WorkerId, now: float) -> Iterable[Held]:
        found = (Held(shard, x.version, mirror=True) for x in self._mirrors for shard in x.of(worker, now))
        return dict.fromkeys(found)

    def forget(self, workers: Iterable[WorkerId]) -> None:
        """These are dead."""
        for worker in workers:
            self._trained.pop(worker, None)
            for mirrors in self._mirrors:
                mirrors.shards.pop(worker, None)

    def missing(self, world: World) -> float:
        """Bytes that the member that misses most has to get before the world can train."""
        self._shards = shards_in(world, self._model)
        if world.base == INITIAL and not world.saved:
            return 0.0
        missing: dict[tuple[Shard, tuple[Held, ...]], float] = {}
        for worker, shard in self._shards.items():
            held = self._trained.get(worker, NOTHING)
            if (shard, held) not in missing:
                kept = [h.shard for h in held if h.version == world.base]
                missing[shard, held] = self._bytes(shard, kept)
        return max(missing.values(), default=0.0)

    def _bytes(self, wanted: Shard, kept: Sequence[Shard]) -> float:
        """Of what is wanted and not kept; of shards with owned ranges, all or nothing."""
        if wanted in kept:
            return 0.0
        if wanted.owned is not None:
            return STATE_BYTES / self._parts * sum(stop - start for start, stop in wanted.owned)
        alike = [s for s in kept if (s.part, s.parts) == (wanted.part, wanted.parts) and s.owned is None]
        layers = (i for i in range(wanted.start, wanted.stop) if not any(s.start <= i < s.stop for s in alike))
        return STATE_BYTES / self._parts / wanted.parts * sum(self._elements[i] for i in layers)

    def join(self, world: World) -> None:
        """Every member has its shard of the base; others of that version stay until the first vote (rule 13)."""
        base = world.base
        held: dict[Shard, tuple[Held, ...]] = {}
        for worker, shard in self._shards.items():
            mine = held.get(shard)
            if mine is None:
                mine = held[shard] = (Held(shard, base),)
            before = self._trained.get(worker, NOTHING)
            kept = tuple(h for h in before if h.version == base and h.shard != shard) if before != mine else NOTHING
            self._trained[worker] = (*mine, *kept) if kept else mine
        self._keep_mirrors(world, [x for x in self._mirrors if x.version in (world.mirrored, base)])

    def voted(self, world: World) -> None:
        """The first vote of this world is complete: mirrors of earlier ones are of no use any more."""
        useful = [x for x in self._mirrors if world.generation == x.generation or x.version == world.mirrored]
        self._keep_mirrors(world, useful)

    def halt(self, now: float) -> None:
        """Somebody has died, or all leave: what is on its way to a mirror does not arrive."""
        for mirrors in self._mirrors:
            mirrors.whole_at = inf if mirrors.whole_at > now else mirrors.whole_at
        self.mirroring_until = 0.0

    def stop(self, version: Version) -> None:
        """The world that had joined stops; what its members train is of this version, which it has committed."""
        held: dict[Shard, tuple[Held, ...]] = {}
        for worker, shard in self._shards.items():
            if worker in self._trained:
                mine = held.get(shard)
                if mine is None:
                    mine = held[shard] = (Held(shard, version),)
                self._trained[worker] = mine

    def mirror(self, world: World, version: Version, whole_at: float) -> None:
        """Every member takes a snapshot of what it owns, and sends it to its keeper; over the older mirror (rule 9).

        What is there of the same version since an earlier generation stays, as part of this one.
        """
        others = [x for x in self._mirrors if x.version != version]
        same = [x for x in self._mirrors if x.version == version]
        for x in same:
            x.generation = world.generation
        plan = mirrors_of(world, self._model)
        shards: dict[WorkerId, list[Shard]] = {worker: [mine.shard] for worker, mine in plan.items()}
        for mine in plan.values():
            shards.setdefault(mine.keeper, []).append(mine.shard)
        fresh = Mirrors(world.generation, version, {w: tuple(s) for w, s in shards.items()}, plan.keys(), whole_at)
        kept = [x for x in others if version == world.base or x.version == others[-1].version]
        self._keep_mirrors(world, [*kept, *same, fresh])
        self.mirroring_until = whole_at

    def _keep_mirrors(self, world: World, kept: Sequence[Mirrors]) -> None:
        """Members free all other mirrors; who has no place in the world keeps its own."""
        dropped = [x for x in self._mirrors if not any(x is y for y in kept)]
        for x in dropped:
            x.shards = {w: shards for w, shards in x.shards.items() if w not in self._shards}
        self._mirrors = [*(x for x in dropped if x.shards), *kept]
