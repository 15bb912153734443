"""The shards in a worker's memory: the one that it trains, and older ones that others may still need (rule 13)."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from evenkeel.control.messages import Held
from evenkeel.core.ids import INITIAL, WorkerId
from evenkeel.core.model import Shard
from evenkeel.core.world import World
from evenkeel.engine.groups import Group
from evenkeel.engine.job import Job
from evenkeel.engine.optimizer import AdamW
from evenkeel.engine.progress import Progress
from evenkeel.engine.random import RandomKey, bind_random
from evenkeel.engine.saver import load
from evenkeel.engine.seat import Seat
from evenkeel.engine.slices import OwnedSlices
from evenkeel.engine.state import ShardState
from evenkeel.engine.transfer import carry_out
from evenkeel.plan.copies import shards_in
from evenkeel.plan.reshard import transfers


@dataclass(frozen=True, slots=True)
class Memory:
    """A shard that is trained: its buffers, modules and optimizer, and the key that its dropouts draw by."""

    state: ShardState
    optimizer: AdamW
    key: RandomKey

    @property
    def device(self) -> torch.device:
        return self.state.params.device

    def flip(self) -> None:
        """The planned fault "flip": one bit of the state changes, and nobody is told."""
        moments = self.state.exp_avg
        words = moments.view(torch.int32)
        words[words.numel() // moments.numel() - 1] ^= 1 << 29  # of the first element's exponent


class Holdings:
    """Shards by what they are. Which version each has is the Member's knowledge, not known here."""

    def __init__(self, job: Job, device: torch.device) -> None:
        self._job = job
        self._device = device
        self._current: Memory | None = None
        self._older: tuple[ShardState, ...] = ()

    @property
    def current(self) -> Memory:
        assert self._current is not None
        return self._current

    def reshard(
        self,
        world: World,
        me: WorkerId,
        seat: Seat,
        mirrored: Sequence[OwnedSlices],
        group: Group,
        progress: Progress,
    ) -> Memory:
        """The shard that the layout gives this worker, at the world's base.

        Beside what is held at the base, which stays as it is; if that same shard is the current one, that one is it.
        Also where the others read from a checkpoint: if that has a wrong copy, this may be the last that is right, and
        the first vote compares them.

        Args:
            seat: whose member knows what the shards in memory are.
            mirrored: snapshots of the base.
        """
        shards = shards_in(world, self._job.shape)
        shard = shards[me]
        with seat.changed:
            seat.member.begin_reshard(shard, world.base)
            true = {h.shard for h in seat.member.trained if h.version == world.base}
            same = seat.member.held == Held(shard, world.base)
        sources = [*(state for state in self._states() if state.shard in true), *mirrored]
        usable = self._current is not None and self._current.state.shard == shard
        memory = self.current if usable else self._build(shard)
        if world.saved:
            if not same:
                load(self._job, world.base, memory.state, progress)
        elif world.base == INITIAL:
            if not same:
                memory.state.initialise(self._job.settings.seed, progress.moved)
        else:
            holders = [(source.worker_id, source.shard) for source in world.sources]
            plan = transfers(self._job.shape, holders, world.layout, dict(world.nodes), shards)
            carry_out(plan, me, memory.state, sources, group, progress)
        return memory

    def adopt(self, memory: Memory, held: Iterable[Held]) -> None:
        """From here on `memory` is the current one; of the others those stay that the member still holds."""
        self._older = tuple(s for s in self._states() if s.shard != memory.state.shard)
        self._current = memory
        self.keep(held)

    def keep(self, held: Iterable[Held]) -> None:
        """Frees what the member holds no more."""
        shards = {h.shard for h in held}
        self._older = tuple(state for state in self._older if state.shard in shards)

    def _states(self) -> tuple[ShardState, ...]:
        return self._older if self._current is None else (self._current.state, *self._older)

    def _build(self, shard: Shard) -> Memory:
        job, settings = self._job, self._job.settings
        state = ShardState(job.model, job.shape, shard, settings.precision, self._device, settings.seed)
        key = RandomKey(settings.seed)
        bind_random(state.stage, key)
        optimizer = AdamW(state, betas=settings.betas, eps=settings.eps, weight_decay=settings.weight_decay)
        return Memory(state, optimizer, key)
