"""Bits that flip in a worker's memory, and what must hold of them.

A flip is a number in the history of one slice of one worker: from there on, its content is another one, and so is
whatever is copied from it. What all copies have in common is the state, for who was never told of better; but copies
that differ must be noticed within a few steps, and what was found to be wrong must never come back.
"""

from collections import Counter
from collections.abc import Iterable
from random import Random
from typing import TYPE_CHECKING

from evenkeel.control import messages as m
from evenkeel.core.ids import INITIAL, Version
from evenkeel.core.vote import Vote
from evenkeel.core.world import World
from evenkeel.plan.comparison import Compared
from evenkeel.plan.state import Slice
from evenkeel.sim.ballot import compared_in, contents_of
from evenkeel.sim.memory import History, flips
from evenkeel.sim.violation import require

if TYPE_CHECKING:
    from evenkeel.sim.checks import Checks
    from evenkeel.sim.worker import SimWorker


class Corruption:
    """Watches one run.

    Attributes:
        since: the step of the state in which each bit has flipped.
        named: flips that made copies differ and were found so.
        distrusted: versions whose checkpoints may hold a wrong copy.
        unproven: versions with which a generation ended.
        read: versions that everybody has read from their checkpoints.
        common: flips that all copies of a slice, if there were several, had when a version was committed.
        in_doubt: the last decision says that no copy of its base counts.
    """

    def __init__(self, checks: "Checks") -> None:
        self.checks = checks
        self.rng = Random(f"{checks.fleet.scenario.seed} flips")
        self.since: dict[int, int] = {}
        self.named: set[int] = set()
        self.distrusted: set[Version] = set()
        self.unproven: set[Version] = set()
        self.read: set[Version] = set()
        self.common: dict[tuple[Version, Slice], frozenset[int]] = {}
        self.in_doubt = False

    def strike(self, worker: "SimWorker") -> None:
        """A bit flips in what the worker trains, if it does."""
        held, prepared = worker.member.held, worker.member.prepared
        if held is None or held.shard not in worker.memory.shards:
            return
        version = held.version if held.version is not None else prepared
        pieces = sorted(worker.memory.shards[held.shard])
        if version is not None and pieces:
            number = len(self.since)
            self.since[number] = version.step
            worker.memory.flip(held.shard, self.rng.choice(pieces), number)

    # ------------------------------------------------------------ what workers do

    def joined(self, worker: "SimWorker") -> None:
        """What was found to be wrong is nowhere a state to go on from: not from its holder, nor from a checkpoint."""
        held = worker.member.held
        assert held is not None
        found = flips_in(worker.memory.shards[held.shard].values()) & self.named
        require(not found, f"{worker.info.worker_id} begins with the flipped bits {sorted(found)}, known to be wrong")

    def committed(self, worker: "SimWorker", version: Version, vote: Vote) -> None:
        """Nobody goes on for long with another content than the others."""
        world, me = worker.member.world, worker.info.worker_id
        assert world is not None
        require(not vote.differences, f"{me} commits {version}, though {vote.differences}")
        if not self.checks.fleet.scenario.flips:
            return
        for part in worker.compared:
            if me not in part.owners:
                continue
            contents = contents_of(worker, part)
            for piece, history in contents.items():
                self.common[version, piece] = self.common.get((version, piece), flips(history)) & flips(history)
            mine = flips_in(contents.values())
            late = {n for n in mine if version.step - self.since[n] > world.compare_every}
            for other in self._others(worker, part) if late else ():
                missing = late - flips_in(contents_of(other, part).values())
                require(not missing, f"{me} commits {version} with bits flipped that {other.info.worker_id} has not")

    def _others(self, worker: "SimWorker", part: Compared) -> list["SimWorker"]:
        """Other owners in the same world, as far as they hold their copy."""
        others = [self.checks.fleet.workers[owner] for owner in part.owners if owner != worker.info.worker_id]
        return [w for w in others if w.alive and w.member.world == worker.member.world and part in w.compared]

    # ------------------------------------------------------------ what the controller writes down

    def settled(self, entry: m.StepSettled, world: World) -> None:
        divergence = entry.decision.divergence
        self.in_doubt = entry.decision.void
        fleet, base = self.checks.fleet, entry.decision.base
        if base.generation == world.generation:
            self.unproven.add(base)
        if divergence is None:
            return
        if self.in_doubt:
            self.distrusted |= self.unproven
            self.checks.mirrors.begun = self.checks.mirrors.whole = None
        if base in self.unproven:
            self.distrusted.add(base)
        require(bool(self.since), f"copies differ though no bit has flipped: {divergence.differences}")
        named, counted = set[int](), set[int]()
        sums = {difference.part: dict(difference.sums) for difference in divergence.differences}
        for part in compared_in(world, fleet.scenario.policy.model):
            held = {o: flips_in(contents_of(fleet.workers[o], part).values()) for o in part.owners}
            theirs = sums.get(part.name) or dict.fromkeys(held, 0)
            count = Counter(theirs.values())
            right = [held[o] for o in held if 2 * count[theirs[o]] > len(held)]
            # Of copies without a majority none counts, but what they have in common is in no doubt.
            counted |= frozenset.union(*right) if right else frozenset.intersection(*held.values())
            named |= frozenset.union(*held.values())
        # TP ranks are not compared: a bit may count where one has it that does not where another has it.
        self.named |= named - counted
        fleet.seen["copies without a majority" if entry.decision.void else "odd copy out"] += 1

    def opened(self, world: World) -> None:
        self.in_doubt = False
        if not world.saved:
            return
        require(world.base not in self.distrusted, f"generation {world.generation} reads {world.base}: distrusted")
        if world.sources:
            return
        if world.base in self.unproven:
            for worker in (self.checks.fleet.workers[w] for w in world.layout.members):
                held = [h for h in worker.member.trained if h.version == world.base and worker.alive]
                require(not held, f"generation {world.generation}: {worker.info.worker_id} has {held}, read by all")
        self.read.add(world.base)
        self.unproven.discard(world.base)

    def restored(self, base: Version) -> None:
        """Where copies differ the run goes back to a version of which they did not, or that all were read from."""
        store = self.checks.fleet.store
        if not self.in_doubt or base == INITIAL or base in self.read:
            return
        assert store is not None
        for name in store.manifests[base.step][1]:
            for piece, history in store.files[name].items():
                wrong = flips(history) - self.common.get((base, piece), flips(history))
                require(not wrong, f"the run goes back to {base}, of which copies of {piece} differed")


def flips_in(histories: Iterable[History]) -> frozenset[int]:
    return frozenset(number for history in histories for number in flips(history))
