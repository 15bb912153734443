"""A worker of an exhaustive exploration: the real Member, and where its training thread stands."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from evenkeel.control import messages as m
from evenkeel.control.member import Member
from evenkeel.core.ids import Version, WorkerId
from evenkeel.core.vote import SLOTS, Slot, Vote
from evenkeel.core.world import World

COLLECTIVES = {"join": "regroup", "sum": "sum", "vote": "vote", "finish": "finish"}
"""Where the thread waits, and in which collective."""


@dataclass(slots=True)
class Unit:
    """`at` is parked, join, step, sum, vote, commit, settle (a commit by decision) or finish. The model is one shard,
    so that one history says what the worker holds."""

    member: Member
    at: str = "parked"
    alive: bool = True
    step: int = 0
    history: tuple[Version, ...] = ()
    asked: tuple[int, int] | None = None
    settling: tuple[int, int] = (0, 0)
    out: list[m.Event] = field(default_factory=list)

    def copy(self) -> "Unit":
        return replace(self, member=replace(self.member), out=[])

    @property
    def name(self) -> WorkerId:
        return self.member.worker_id

    @property
    def world(self) -> World:
        assert self.member.world is not None
        return self.member.world

    @property
    def told_to_abort(self) -> bool:
        return self.at not in ("parked", "commit", "settle") and not self.member.running(self.member.generation)

    # ------------------------------------------------------------ control thread

    def hear(self, command: m.Command) -> None:
        match command:
            case m.Abort(_, epoch, generation, ask, acknowledged):
                if self.member.abort(epoch, generation, acknowledged):
                    self.asked = (generation, ask)
                    self._answer()
            case m.Settle(_, epoch, ask, decision):
                self._settle(epoch, ask, decision)
            case m.Form(_, epoch, world):
                if self.member.form(epoch, world):
                    self.at, self.step = "join", world.base.step
            case m.Request(_, epoch, generation, flags):
                self.member.request(epoch, generation, flags)
            case m.Probe(_, _, probe):
                self.out.append(m.Located(self.name, probe, self.position()))
            case _:
                raise AssertionError(f"not for a worker: {command}")

    def position(self) -> m.Position:
        phase = {"parked": "parked", "join": "regroup", "settle": "commit", "step": "forward", "sum": "reduce"}
        return m.Position(self.member.generation, self.step, m.PHASES.index(phase.get(self.at, self.at)))

    def _answer(self) -> None:
        if self.asked is None:
            return
        answer = self.member.answer(self.asked[0], self.position())
        if answer is not None:
            generation, ask = self.asked
            self.asked = None
            self.out.append(m.Answered(self.name, generation, ask, answer))

    def _settle(self, epoch: int, ask: int, decision: m.Decision) -> None:
        settlement = self.member.settle(epoch, decision)
        if not settlement.accepted:
            return
        if settlement.commit is None:
            self.out.append(m.Settled(self.name, decision.generation, ask, self.member.holdings))
            return
        self.member.begin_commit()
        self.at, self.settling = "settle", (decision.generation, ask)

    # ------------------------------------------------------------ training thread

    def park(self) -> None:
        self.at = "parked"
        self.member.park()
        self._answer()

    def reshard(self, sources: Mapping[WorkerId, "Unit"]) -> None:
        """Takes the state of the world's base from whoever holds it; an error if that one is dead."""
        world = self.world
        if world.base.step == 0:
            self.history = ()
        elif self.name not in {s.worker_id for s in world.sources}:
            source = sources[world.sources[0].worker_id]
            if not source.alive:
                self.broken()
                return
            self.history = source.history
        self.member.resharded(world.layout.shard(self.name), world.base)
        self.out.append(m.Joined(self.name, world.generation))
        self.at = "step"

    def begin_step(self) -> None:
        if self.step >= self.world.last_step:
            self.at = "finish"
            return
        self.step += 1
        self.member.begin_sums(1)
        self.at = "sum"

    def summed(self) -> None:
        self.member.sum_done()
        self.member.prepare(self.member.generation, self.step)
        self.at = "vote"

    def vote(self, ones: int) -> Vote:
        values = [0.0] * SLOTS
        values[Slot.ONES], values[Slot.STEP], values[Slot.TOKENS] = ones, self.step * ones, 8.0 * ones
        return Vote(self.member.generation, self.step, tuple(values))

    def see(self, vote: Vote) -> None:
        """The vote's all-reduce has returned here, truly or not."""
        if self.member.see(vote):
            self.member.begin_commit()
            self.at = "commit"
        else:
            self.park()

    def end_commit(self) -> Version:
        """Returns the version that it has committed."""
        prepared = self.member.prepared
        assert prepared is not None
        self.history = (*self.history, prepared)
        report = self.member.end_commit(0.0)
        if self.at == "settle":
            self.park()
            generation, ask = self.settling
            self.out.append(m.Settled(self.name, generation, ask, self.member.holdings))
            return prepared
        if report is not None:
            self.out.append(report)
        if self.member.running(self.member.generation):
            self.at = "step"
        else:
            self.park()
        return prepared

    def finished(self) -> None:
        word = self.member.finished(None)
        if word is not None:
            self.out.append(word)
        self.park()

    def broken(self) -> None:
        """A neighbour's death reaches the blocked collective."""
        fault = m.Fault(self.step, self.at, 0, "", "connection closed by peer", collective=True)
        self.park()
        self.out.append(m.Failed(self.name, self.member.generation, fault))
