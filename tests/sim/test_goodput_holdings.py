"""What the simulator of days says that workers hold is what the protocol's own Member would say, worker by worker."""

from collections.abc import Sequence

import pytest
from goodput_settings import random_setting

from evenkeel.control import messages as m
from evenkeel.control.member import Member
from evenkeel.core.ids import INITIAL, Version, WorkerId
from evenkeel.core.model import Shard
from evenkeel.core.vote import Flags, Slot, Vote
from evenkeel.core.world import World
from evenkeel.plan.copies import shards_in
from evenkeel.plan.mirrors import mirrors_of
from evenkeel.sim.goodput import training as stretches
from evenkeel.sim.goodput.run import Run
from evenkeel.sim.goodput.setting import Setting
from evenkeel.sim.goodput.training import Training


class Watched(Run):
    """A run beside which every worker has a Member that goes through each step."""

    def __init__(self, setting: Setting) -> None:
        self.members: dict[WorkerId, Member] = {}
        self.arriving: list[tuple[float, WorkerId, Version, tuple[Shard, ...]]] = []
        self.settling: m.Decision | None = None
        self.compared = 0
        super().__init__(setting)

    def hear(self, events: Sequence[m.Event]) -> None:
        self.arrive()
        for event in events:
            if isinstance(event, m.WorkerReady):
                self.members[event.worker.worker_id] = Member(event.worker.worker_id)
            elif isinstance(event, m.Answered):
                self.compare(event.worker_id, event.answer.held)
            elif isinstance(event, m.Settled):
                assert self.settling is not None
                settled = self.members[event.worker_id].settle(1, self.settling)
                assert settled.accepted and settled.commit is None
                self.compare(event.worker_id, event.held)
        super().hear(events)

    def compare(self, worker: WorkerId, held: tuple[m.Held, ...]) -> None:
        assert set(held) == set(self.members[worker].holdings)
        self.compared += 1

    def arrive(self) -> None:
        """Parts of mirrors that have arrived by now."""
        for at_s, worker, version, shards in self.arriving:
            for shard in shards if at_s <= self.now else ():
                self.members[worker].mirrored(version, shard)
        self.arriving = [x for x in self.arriving if x[0] > self.now]

    def _halt(self, training: Training) -> None:
        self.arrive()
        self.arriving = []
        super()._halt(training)

    def _tell(self, commands: Sequence[m.Command]) -> None:
        for command in commands:
            if isinstance(command, m.Abort) and command.worker_id in self.members:
                self.members[command.worker_id].abort(1, command.generation, command.acknowledged)
                self.members[command.worker_id].park()
            elif isinstance(command, m.Form):
                assert self.members[command.worker_id].form(1, command.world)
            elif isinstance(command, m.Settle):
                self.settling = command.decision
        super()._tell(commands)

    def _join(self, world: World, reshard_s: float) -> None:
        before = self._training
        self.arrive()
        super()._join(world, reshard_s)
        if self._training is None or self._training is before or self._training.world is not world:
            return
        for worker, shard in shards_in(world, self.setting.model).items():
            self.members[worker].begin_reshard(shard, world.base)
            self.members[worker].resharded(shard, world.base)
        if world.mirror_every is not None and world.base != INITIAL:
            self.begin_mirror(world, world.base)

    def begin_mirror(self, world: World, version: Version) -> None:
        plan = mirrors_of(world, self.setting.model)
        costs = self.setting.costs
        for worker in world.layout.members:
            kept = tuple(mine.shard for mine in plan.values() if mine.keeper == worker)
            own = (plan[worker].shard,) if worker in plan else ()
            self.members[worker].begin_mirror(version, (*own, *kept))
            for shard in own:
                self.members[worker].mirrored(version, shard)
            self.arriving.append((self.now + costs.mirror_stall_s + costs.mirror_send_s, worker, version, kept))

    def _commit(self, training: Training, last: int) -> None:
        world = training.world
        assert last == training.step + 1
        self.arrive()
        flags = training.flags(last, self.saving.busy_until, self.holdings.mirroring_until)
        values = list(training.votes(last, flags)[0].values)
        values[Slot.STEP] = last * world.size
        vote = Vote(world.generation, last, tuple(values))
        for worker in world.layout.members:
            member = self.members[worker]
            member.prepare(world.generation, last)
            assert member.see(vote)
            member.begin_commit()
            member.end_commit(self.now)
        if flags & Flags.MIRROR:
            self.begin_mirror(world, Version(last, world.generation))
        super()._commit(training, last)


@pytest.mark.parametrize("seed", range(20, 32))
def test_holdings_are_those_of_members(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stretches, "MOST", 0)
    setting = random_setting(seed)
    run = Watched(setting)
    run.until(setting.duration_s)
    assert run.compared > 0
