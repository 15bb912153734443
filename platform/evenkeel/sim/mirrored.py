"""What must hold of mirrors (rules 7 to 9): what was whole everywhere can be gone back to, while one copy is alive."""

from typing import TYPE_CHECKING

from evenkeel.control import messages as m
from evenkeel.core.ids import INITIAL, Version, WorkerId
from evenkeel.core.model import Shard
from evenkeel.core.vote import Vote
from evenkeel.core.world import World
from evenkeel.plan.coverage import lost_slices
from evenkeel.plan.mirrors import mirrors_of
from evenkeel.plan.state import Slice
from evenkeel.sim.memory import History, Snapshot, clean
from evenkeel.sim.mirror import shards_of
from evenkeel.sim.violation import require

if TYPE_CHECKING:
    from evenkeel.sim.checks import Checks
    from evenkeel.sim.worker import SimWorker


class MirrorChecks:
    """Attributes:
    begun: the version that is being mirrored in the newest world, and its holders: pairs of owner and keeper.
    whole: the newest that a vote says is whole everywhere, with those.
    """

    def __init__(self, checks: "Checks") -> None:
        self.checks = checks
        self.begun: tuple[Version, list[tuple[WorkerId, WorkerId]]] | None = None
        self.whole: tuple[Version, list[tuple[WorkerId, WorkerId]]] | None = None

    def taken(self, worker: "SimWorker", snapshot: Snapshot, contents: dict[Slice, History]) -> None:
        """The last byte of a snapshot is there: it is of the version that it will be labelled with."""
        known = self.checks.histories.get(snapshot[0])
        wrong = {history for history in contents.values() if clean(history) != known}
        require(not wrong, f"{worker.info.worker_id} mirrors {snapshot[0]} with {wrong}; it is {known}")

    def opened(self, world: World) -> None:
        if world.mirror_every is None:
            self.begun = self.whole = None  # other workers train the same state: mirrors are dropped
            return
        self.begun = None if world.base == INITIAL else (world.base, self._holders(world))
        promised = self._promised()
        if promised is not None:
            kept = world.mirrored
            name = f"generation {world.generation} keeps the mirrors of {kept}"
            require(kept is not None and _age(kept) >= _age(promised), f"{name}, but {promised} is whole")
        if self.whole is not None and world.mirrored is not None and _age(world.mirrored) > _age(self.whole[0]):
            self.whole = None  # its members drop it: what is kept is newer, and may be with others than begun with

    def voted(self, vote: Vote) -> None:
        """What a vote says that begins a mirror: the one before it is whole everywhere."""
        version = Version(vote.step, vote.generation)
        if not vote.mirrors or (self.begun is not None and _age(version) <= _age(self.begun[0])):
            return  # or shown again, after its line was lost
        world = self.checks.worlds[vote.generation]
        self.whole = self.begun if self.begun is not None else self.whole
        self.begun = version, self._holders(world)
        self.checks.fleet.seen["mirror begun"] += 1

    def restored(self, name: str, base: Version, mirrored: bool) -> None:
        """Nobody goes back further than to what is whole and alive; nor to mirrors that are not."""
        for newer in (self._promised(), self._told()):
            if newer is not None:
                require(_age(base) >= _age(newer), f"{name}, but the mirrors of {newer} are alive")
        if mirrored:
            shards = [s for w in self.checks.counts() for s in shards_of(w, base)]
            lost = lost_slices(self.checks.fleet.scenario.policy.model, shards)
            require(not lost, f"{name} by mirrors, which do not hold {lost}")
            self.checks.fleet.seen["back to mirrors"] += 1

    def nothing_promised(self) -> None:
        """The run is given up."""
        for mirrored in (self._promised(), self._told()):
            require(mirrored is None, f"given up although the mirrors of {mirrored} are alive")

    def _promised(self) -> Version | None:
        """The newest version that was whole everywhere, unless both who had some piece of it are gone."""
        if self.whole is None or self.checks.is_gone(self.whole[0]):
            return None
        version, holders = self.whole
        here = {w.info.worker_id for w in self.checks.counts()}
        return version if all(owner in here or keeper in here for owner, keeper in holders) else None

    def _told(self) -> Version | None:
        """The newest version of which the mirrors that were told of in the last answers, and are alive, are all."""
        settled = [entry for entry in self.checks.fleet.journal if isinstance(entry, m.StepSettled)]
        here = {w.info.worker_id for w in self.checks.counts()}
        shards: dict[Version, list[Shard]] = {}
        for worker, answer in settled[-1].evidence.items() if settled else ():
            for held in answer.held:
                if held.mirror and held.version is not None and worker in here:
                    shards.setdefault(held.version, []).append(held.shard)
        model = self.checks.fleet.scenario.policy.model
        whole = [v for v, of in shards.items() if not self.checks.is_gone(v) and not lost_slices(model, of)]
        return max(whole, key=_age, default=None)

    def _holders(self, world: World) -> list[tuple[WorkerId, WorkerId]]:
        plan = mirrors_of(world, self.checks.fleet.scenario.policy.model)
        return [(worker, mirroring.keeper) for worker, mirroring in plan.items()]


def _age(version: Version) -> tuple[int, int]:
    return version.generation, version.step
