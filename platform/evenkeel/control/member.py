"""The worker's side of the step protocol, without threads, clocks or I/O.

The engine's worker and the simulator's worker both hold one Member and do what it says, so what the swarm explores
is what trains. The caller serialises the calls (a lock in the engine): those of the control thread (meet, abort,
answer, settle, form, request) and those of the training thread (the rest).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from evenkeel.control.messages import Answer, Decision, Finished, Held, Position, Report, Reported
from evenkeel.core.ids import Generation, Version, WorkerId
from evenkeel.core.model import Shard
from evenkeel.core.vote import Flags, Timing, Vote
from evenkeel.core.world import World
from evenkeel.plan import timing
from evenkeel.plan.comparison import due

RING = 256
"""Votes that a worker keeps until the controller has acknowledged them; a leader with a full ring pauses (rule 16)."""


@dataclass(frozen=True, slots=True)
class Mirror:
    """A version in a worker's host memory beside what it trains: a snapshot of its own part, and those of others.

    Attributes:
        generation: that mirrored it last.
        shards: its own and those that it keeps for others, by the layout of that generation.
        whole: those of which the last byte is there (rule 8).
        earlier: those that are there since an earlier generation mirrored the same version.
    """

    generation: Generation
    version: Version
    shards: tuple[Shard, ...]
    whole: tuple[Shard, ...] = ()
    earlier: tuple[Shard, ...] = ()

    @property
    def held(self) -> tuple[Shard, ...]:
        return tuple(dict.fromkeys((*self.whole, *self.earlier)))

    @property
    def is_whole(self) -> bool:
        return all(shard in self.whole for shard in self.shards)


@dataclass(slots=True)
class Member:
    """One worker's place in the protocol.

    Attributes:
        epoch: of the newest controller heard; commands of lower ones are refused.
        floor: the lowest generation that it still obeys; only grows.
        world: joined or being joined; None for a spare.
        parked: the training thread runs nothing.
        held: the shard that it trains, if any.
        kept: shards of earlier generations, not freed before the first vote of this one is complete (rule 13).
        mirrors: older first. Two, of which the older is whole everywhere, or the best there is (rule 9); until the
            first vote of a generation also that of its base, of which others may still need something (rule 13).
        mirrored_at: the step of the last mirror.
        prepared: what committing the summed gradients in hand would make.
        saw: the completed vote of the open or just committed step.
        diverged: the completed vote of the open step that was refused, because by it copies of the state differ.
        sums: gradient sums of the open step that are not complete yet.
        pending: requests that no committed vote has carried yet (rule 16).
        bad_steps: how many steps were skipped in a row as not finite.
        unreported: the last votes, since the controller's acknowledgement if it gave one.
        timings: what the last vote told beside it; in the leader only.
    """

    worker_id: WorkerId
    epoch: int = 0
    floor: Generation = 0
    world: World | None = None
    parked: bool = True
    held: Held | None = None
    kept: tuple[Held, ...] = ()
    mirrors: tuple[Mirror, ...] = ()
    mirrored_at: int = 0
    prepared: Version | None = None
    saw: Vote | None = None
    diverged: Vote | None = None
    sums: int = 0
    pending: Flags = Flags.NONE
    bad_steps: int = 0
    unreported: tuple[Report, ...] = ()
    timings: tuple[Timing, ...] = ()

    @property
    def trained(self) -> tuple[Held, ...]:
        """The shards that it trains or has trained, the current one first."""
        return self.kept if self.held is None else (self.held, *self.kept)

    @property
    def holdings(self) -> tuple[Held, ...]:
        """All shards in memory, the current one first."""
        mirrored = (Held(shard, x.version, mirror=True) for x in self.mirrors for shard in x.held)
        return (*self.trained, *mirrored)

    @property
    def generation(self) -> Generation:
        return self.world.generation if self.world else 0

    # ------------------------------------------------------------ control thread

    def meet(self, epoch: int) -> bool:
        """Whether this command, of whatever kind, is the first that it hears of a new life of the controller.

        That is to be told again what the life before may have taken with it.
        """
        anew = epoch > self.epoch
        self.epoch = max(self.epoch, epoch)
        return anew

    def abort(self, epoch: int, generation: Generation, acknowledged: int) -> bool:
        """Takes an abort of generations <= generation; False if it is an old controller's or an old one.

        The floor is raised before anything is broken, so that a vote that an abort makes look complete is never
        believed (rule 2), and so that a generation that it has not heard of yet is refused too (rule 14).
        """
        if epoch < self.epoch or self.generation > generation or self.floor > generation + 1:
            return False
        self.epoch = epoch
        self.floor = max(self.floor, generation + 1)
        self.acknowledge(acknowledged)
        return True

    def running(self, generation: Generation) -> bool:
        """Whether this generation may still do anything that outlives a step."""
        return generation >= self.floor

    def answer(self, generation: Generation, position: Position) -> Answer | None:
        """The promise, once the training thread has parked (rule 1); None before that, or if the floor has moved on."""
        if not self.parked or self.floor != generation + 1:
            return None
        return Answer(position, self.holdings, self.saw, self.prepared, self.unreported, self.diverged)

    def settle(self, epoch: int, decision: Decision) -> "Settlement":
        """What to do for a decision: commit the prepared step with its vote, or drop it. Refused if old or not parked.

        If there is something to commit, the worker counts as not parked until the caller has committed and called
        park(): an abort that comes meanwhile is answered with the state that the commit leaves.
        """
        if epoch < self.epoch or not self.parked or self.floor != decision.generation + 1:
            return Settlement(accepted=False)
        self.epoch = epoch
        if decision.vote is not None and self.prepared == decision.base:
            self.saw = decision.vote
            self.parked = False
            return Settlement(accepted=True, commit=decision.vote)
        self.prepared = None
        self.saw = None
        if decision.void:
            self.held, self.kept, self.mirrors = None, (), ()
        return Settlement(accepted=True)

    def form(self, epoch: int, world: World) -> bool:
        """Takes a place in a world; False if it is an old controller's, aborted, or not newer than what it has."""
        if epoch < self.epoch or world.generation < self.floor or world.generation <= self.generation:
            return False
        if not self.parked:
            return False
        self.epoch = epoch
        self.floor = world.generation
        self.world = world
        self.parked = False
        self.mirrored_at = world.base.step
        self.prepared = None
        self.saw = self.diverged = None
        self.unreported = ()
        self.timings = ()
        self.pending = Flags.NONE
        self.bad_steps = world.bad_steps
        return True

    def request(self, epoch: int, generation: Generation, flags: Flags) -> bool:
        """Puts flags on the next votes of this generation."""
        if epoch < self.epoch or generation != self.generation:
            return False
        self.pending |= flags
        return True

    def flags(self, step: int) -> Flags:
        """What this worker asks of the vote of a step. The leader knows when a checkpoint is due."""
        assert self.world is not None
        every, last = self.world.checkpoint_every, step == self.world.last_step
        if self.world.leader != self.worker_id:
            return self.pending & ~Flags.CHECKPOINT
        flags = self.pending if every is not None else self.pending & ~Flags.CHECKPOINT
        if every is not None and (last or (every > 0 and step % every == 0) or Flags.STOP in self.pending):
            flags |= Flags.CHECKPOINT
        if self.world.mirror_every is not None and not last and step - self.mirrored_at >= self.world.mirror_every:
            flags |= Flags.MIRROR
        return flags

    def busy(self, step: int, writing: bool) -> bool:
        """What it says in the vote of a step while it is still writing its last copy.

        Nothing in the last one: no later step changes that state, so it is copied as soon as there is room.
        """
        assert self.world is not None
        return writing and step < self.world.last_step

    def measures(self, step: int) -> bool:
        """Whether the vote of a step tells what everybody has measured; all members agree."""
        assert self.world is not None
        return timing.due(self.world, step)

    def compares(self, step: int) -> bool:
        """Whether the vote of a step compares the copies of the version that it begins from; all members agree."""
        assert self.world is not None
        return due(self.world, step, self.saw)

    def acknowledge(self, step: int) -> None:
        """The controller has made steps up to `step` durable."""
        self.unreported = tuple(r for r in self.unreported if r.vote.step > step)

    # ------------------------------------------------------------ training thread

    def begin_reshard(self, shard: Shard, version: Version) -> None:
        """This shard is about to be filled with a version, over what there is of it (rule 8).

        Whatever version that has, nobody will ask for it: the one to begin from is decided, and it is not that.
        """
        if self.held is not None and self.held.shard == shard and self.held.version != version:
            self.held = None

    def resharded(self, shard: Shard, version: Version) -> None:
        """The shard of the new world is whole. Others of this version stay until the first vote (rule 13)."""
        assert self.world is not None
        self.kept = tuple(h for h in self.trained if h.version == version and h.shard != shard)
        self.held = Held(shard, version)
        self.mirrors = tuple(x for x in self.mirrors if x.version in (self.world.mirrored, version))

    def tear(self) -> None:
        """The held shard is about to be written (rule 8)."""
        assert self.held is not None
        self.held = Held(self.held.shard, None)

    def begin_sums(self, count: int) -> None:
        """The step has so many gradient sums to take part in, one for each of its sync groups."""
        self.sums = count

    def sum_done(self) -> None:
        """One more sum is complete, or ordered before the vote on the device's stream."""
        self.sums -= 1

    @property
    def may_vote(self) -> bool:
        """The vote comes last: only when every sum is in hand (rule 3)."""
        return self.sums == 0

    def prepare(self, generation: Generation, step: int) -> None:
        """It enters the vote: from here on a decision may ask it to commit what it holds."""
        assert self.may_vote
        self.prepared = Version(step, generation)

    def see(self, vote: Vote, told: Sequence[float] = ()) -> bool:
        """Takes a vote read back from the device, and what else it told (timing.split); True if the commit may begin.

        The guards come first, then the abort flag (rule 2): the control thread raises the floor before it aborts,
        so a vote that an abort completed falsely is refused here whichever way it looks. One by which copies of the
        state differ is refused too, by everybody, as it is the same everywhere; it is kept for the answer.
        """
        assert self.world is not None
        if not vote.complete(self.world.size) or not self.running(vote.generation):
            return False
        if vote.differences:
            self.diverged = vote
            return False
        self.saw = vote
        self.timings = timing.read(self.world, told) if self.world.leader == self.worker_id else ()
        self.kept = ()
        useful = (x for x in self.mirrors if x.generation == self.generation or x.version == self.world.mirrored)
        self.mirrors = tuple(useful)
        self.pending = (self.pending | self.flags(vote.step)) & ~(vote.flags | Flags.MIRROR)
        return True

    def begin_commit(self) -> None:
        """Before the first byte of parameters or optimizer state is written."""
        self.tear()

    def end_commit(self, committed_at: float) -> Reported | None:
        """After the last byte, at this unix time: the state is what was prepared.

        Returns the leader's report to the controller: this vote and all that were not acknowledged. None from everybody
        else: a completed vote proves that all are alive, so one voice is enough; but all remember (rule 16).
        """
        assert self.held is not None and self.prepared is not None and self.saw is not None and self.world is not None
        self.held = Held(self.held.shard, self.prepared)
        self.prepared = None
        self.bad_steps = self.bad_steps + 1 if self.saw.skip else 0
        self.unreported = (*self.unreported, Report(self.saw, committed_at))[-RING:]
        timings, self.timings = self.timings, ()
        return Reported(self.worker_id, self.unreported, timings) if self.world.leader == self.worker_id else None

    def leaves(self, vote: Vote) -> bool:
        """Whether all leave the generation after this commit, and wait for what the controller says."""
        assert self.world is not None
        most = self.world.max_bad_steps
        return vote.leaves or (most is not None and self.bad_steps >= most)

    def begin_mirror(self, version: Version, shards: tuple[Shard, ...]) -> None:
        """It is about to write a snapshot of this version, and to receive those of others, over the older mirror.

        After a vote that says so: the newer one is whole everywhere then. Or with the base of a world: then what there
        is besides is what the controller knows to be the best (rule 9), or the very same version.
        """
        assert self.world is not None
        others = tuple(x for x in self.mirrors if x.version != version)
        earlier = tuple(shard for x in self.mirrors if x.version == version for shard in x.held)
        kept = others if version == self.world.base else others[-1:]
        self.mirrors = (*kept, Mirror(self.generation, version, shards, earlier=earlier))
        self.mirrored_at = version.step

    def mirrored(self, version: Version, shard: Shard) -> None:
        """The last byte of a shard of a mirror is written. Nothing, if that version is not mirrored any more."""
        self.mirrors = tuple(
            replace(x, whole=(*x.whole, shard)) if x.version == version and shard in x.shards else x
            for x in self.mirrors
        )

    @property
    def mirroring(self) -> bool:
        """Whether the last mirror of this generation is not whole here."""
        return any(x.generation == self.generation and not x.is_whole for x in self.mirrors[-1:])

    def finished(self, eval_loss: float | None) -> Finished | None:
        """After the final model is written: the leader's word that the run is done. None from everybody else."""
        assert self.world is not None
        if self.world.leader != self.worker_id:
            return None
        return Finished(self.worker_id, self.generation, self.unreported, eval_loss)

    def park(self) -> None:
        """The training thread has left the generation and will not come back to it."""
        self.parked = True

    @property
    def ring_full(self) -> bool:
        return len(self.unreported) >= RING


@dataclass(frozen=True, slots=True)
class Settlement:
    """`commit` is the vote to commit the prepared step with, None for nothing to commit."""

    accepted: bool
    commit: Vote | None = None
