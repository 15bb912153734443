"""A simulated worker: the real Member, with virtual time where the engine computes and communicates."""

from collections.abc import Callable
from typing import TYPE_CHECKING

from evenkeel.control import messages as m
from evenkeel.control.member import Member
from evenkeel.core.boxes import Box
from evenkeel.core.ids import INITIAL, Version, WorkerId
from evenkeel.core.layout import WorkerInfo, sync_groups
from evenkeel.core.vote import Vote
from evenkeel.core.world import World
from evenkeel.plan import timing
from evenkeel.plan.comparison import Compared, read_vote
from evenkeel.plan.copies import shards_in
from evenkeel.plan.reshard import transfers
from evenkeel.plan.state import Slice, slices
from evenkeel.sim import ballot
from evenkeel.sim.memory import TORN, History, Memory, join
from evenkeel.sim.mirror import Mirrorer
from evenkeel.sim.pace import Pace
from evenkeel.sim.store import Writer

if TYPE_CHECKING:
    from evenkeel.sim.fleet import Command, Fleet


class SimWorker:
    """One process. `task` changes when its training thread drops what it was doing: what was under way is void."""

    def __init__(self, fleet: "Fleet", info: WorkerInfo) -> None:
        self.fleet = fleet
        self.info = info
        self.member = Member(info.worker_id)
        self.memory = Memory(fleet.scenario.policy.model)
        self.writer = Writer(self)
        self.mirrorer = Mirrorer(self)
        self.alive = True
        self.ready = False
        self.hung_until = self.cut_until = 0.0
        self.slow = 1.0
        self.task = 0
        self.phase = "parked"
        self.step = 0
        self.waiting = False
        self.collective = 0
        self.asked: tuple[int, int] | None = None
        self.torn_sums = self.raises = False
        self.pace = Pace(self)
        self.compared: dict[Compared, frozenset[str]] = {}
        self.struck: set[str] = set()
        """Kinds of the faults that it met."""

    # ------------------------------------------------------------ time

    def later(self, delay_s: float, call: Callable[[], None]) -> None:
        """Goes on with the training thread after a while, unless it drops its work before."""
        task = self.task

        def resume() -> None:
            if not self.alive or self.task != task:
                return
            if self.fleet.clock.now < self.hung_until:
                self.fleet.clock.after(self.hung_until - self.fleet.clock.now, resume)
                return
            call()

        self.fleet.clock.after(delay_s, resume)

    def work(self, phase: str, seconds: float, then: Callable[[], None]) -> None:
        self.enter(phase)
        self.later(seconds * self.slow * self.fleet.rng.uniform(0.8, 1.2), then)

    def enter(self, phase: str) -> None:
        self.phase = phase
        self.waiting = False
        self.fleet.moment(self, phase)

    def meet(
        self, name: str, members: tuple[WorkerId, ...], then: Callable[[], None], values: tuple[float, ...] = ()
    ) -> None:
        """A collective: goes on when all members have come."""
        if not self.alive:
            return
        self.waiting = True
        self.collective += 1
        key = (self.member.generation, self.step, name)
        self.fleet.meetings.arrive(self, key, members, then, values)

    def shares(self, what: str, other: "SimWorker") -> bool:
        """Whether both are on one "node", or train the same "stage"."""
        if what == "node":
            return self.info.node_id == other.info.node_id
        mine, theirs = self.member.held, other.member.held
        return mine is not None and theirs is not None and mine.shard == theirs.shard

    def die(self) -> None:
        self.alive = False
        self.task += 1
        self.fleet.meetings.died(self.info.worker_id)

    # ------------------------------------------------------------ control thread

    def deliver(self, command: "Command") -> None:
        if self.member.meet(command.epoch):
            self.writer.tell_again()
        match command:
            case m.Abort(_, epoch, generation, ask, acknowledged):
                if self.member.abort(epoch, generation, acknowledged):
                    self.fleet.moment(self, "abort")
                    self.asked = (generation, ask)
                    if not self.member.parked:
                        self._break_groups()
                    self._answer()
            case m.Settle(_, epoch, ask, decision):
                self._settle(epoch, ask, decision)
            case m.Form(_, epoch, world):
                if self.member.form(epoch, world):
                    self._regroup(world)
            case m.Request(_, epoch, generation, flags):
                self.member.request(epoch, generation, flags)
            case m.Probe(_, _, probe):
                self.fleet.send(self, m.Located(self.info.worker_id, probe, self.position()))
            case _:
                raise AssertionError(f"not for a worker: {command}")

    def position(self) -> m.Position:
        return m.Position(
            self.member.generation, self.step, m.PHASES.index(self.phase), 0, self.collective, self.waiting
        )

    def _answer(self) -> None:
        if self.asked is None:
            return
        generation, ask = self.asked
        answer = self.member.answer(generation, self.position())
        if answer is not None:
            self.asked = None
            self.fleet.send(self, m.Answered(self.info.worker_id, generation, ask, answer))

    def _break_groups(self) -> None:
        """The abort reaches the training thread: a commit is finished first, anything else is dropped soon."""
        if self.phase == "vote" and self.waiting and self.fleet.rng.random() < 0.3:
            # NCCL's abort may return success with a buffer that looks complete (rule 2).
            world = self.member.world
            assert world is not None
            self._saw(ballot.lie(self, world))
        if self.phase not in ("commit", "parked"):
            self.later(self.fleet.rng.uniform(0.0, 0.01), self.park)

    def park(self) -> None:
        self.task += 1
        self.phase = "parked"
        self.waiting = False
        self.member.park()
        self._answer()

    def _settle(self, epoch: int, ask: int, decision: m.Decision) -> None:
        settlement = self.member.settle(epoch, decision)
        if not settlement.accepted:
            return

        def settled() -> None:
            done = m.Settled(self.info.worker_id, decision.generation, ask, self.member.holdings)
            self.fleet.send(self, done)

        vote = settlement.commit
        if vote is None:
            settled()
            return

        def committed() -> None:
            if self._commit_raises():
                return
            self._write()
            self.member.end_commit(self.fleet.clock.now)
            self._save(vote)
            if self.alive:
                self.park()
                settled()

        self.member.begin_commit()
        self.enter("commit")
        self.fleet.moment(self, "settle")
        self.later(self.fleet.rng.uniform(0.001, 0.02), committed)

    # ------------------------------------------------------------ training thread: joining

    def _regroup(self, world: World) -> None:
        self.task += 1
        self.step = world.base.step
        self.collective = 0
        self.raises = False
        self.work("regroup", 0.05, lambda: self.meet("regroup", world.layout.members, lambda: self._reshard(world)))

    def _reshard(self, world: World) -> None:
        self.work("reshard", 0.02, lambda: self._receive(world))
        if world.saved:
            self.fleet.moment(self, "loading")

    def _receive(self, world: World) -> None:
        shard = shards_in(world, self.memory.model)[self.info.worker_id]
        self.member.begin_reshard(shard, world.base)
        kept = self.member.held == m.Held(shard, world.base)
        if kept and (world.base == INITIAL or world.saved):
            pass  # nothing is fetched for it, as in the engine (Holdings.reshard): maybe it is not what others read
        elif world.base == INITIAL:
            self.memory.initialise(shard)
        elif world.saved:
            assert self.fleet.store is not None
            loaded = self.fleet.store.read(self, world.base, slices(self.memory.model, shard))
            if loaded is None:
                self._unreadable(world)
                return
            self.memory.write(shard, loaded)
        else:
            contents = self._gather(world)
            if contents is None:
                self._broken("a peer died while resharding")
                return
            self.memory.write(shard, contents)
        self.compared = ballot.compared_in(world, self.memory.model)
        self.member.resharded(shard, world.base)
        self.memory.keep_only({h.shard for h in self.member.trained})
        self.fleet.checks.joined(self, world)
        if world.mirror_every is not None and world.base != INITIAL:
            self.mirrorer.begin(world, world.base)
            if not self.alive:
                return
        self.fleet.send(self, m.Joined(self.info.worker_id, world.generation))
        self.fleet.moment(self, "joined")
        self.work("forward", 0.0, self._begin_step)

    def _gather(self, world: World) -> dict[Slice, History] | None:
        """Pulls each wanted slice from where the plan says; None if a source is gone."""
        me = self.info.worker_id
        sources = [(s.worker_id, s.shard) for s in world.sources]
        shards = shards_in(world, self.memory.model)
        plan = transfers(self.memory.model, sources, world.layout, dict(world.nodes), shards)
        pieces = [(t.source, t.tensor, t.box) for t in plan.transfers if t.target == me]
        pieces += [(me, s.tensor, s.box) for s in plan.kept[me]]
        self.fleet.checks.covered(self, world, [(tensor, box) for _, tensor, box in pieces])
        received: dict[str, list[tuple[Box, History]]] = {}
        for source, tensor, box in pieces:
            holder = self.fleet.workers[source]
            if not holder.alive:
                return None
            received.setdefault(tensor, []).append((box, holder.read(world.base, tensor, box)))
        wanted = slices(self.memory.model, shards[me])
        return {want: join(want, received.get(want.tensor, [])) for want in wanted}

    def read(self, version: Version, tensor: str, box: Box) -> History:
        """What it sends when it is asked for a box of this version."""
        found = self.memory.read((h.shard for h in self.member.trained if h.version == version), tensor, box)
        return found if found != TORN else self.mirrorer.read(version, tensor, box)

    # ------------------------------------------------------------ training thread: steps

    def _begin_step(self) -> None:
        world = self.member.world
        assert world is not None
        if self.step >= world.last_step:
            self._finish(world)
            return
        self.step += 1
        self.fleet.checks.begins(self, world)
        self.torn_sums = False
        place = world.layout.places[self.info.worker_id]
        pipeline = tuple(w for s in world.layout.pipelines[place.pipeline].stages for w in s.members)
        met = f"pipe{place.pipeline}"
        self.work("forward", self.pace.work_s(world), lambda: self.meet(met, pipeline, self._reduce))

    def _reduce(self) -> None:
        if self.raises:
            self.raises = False
            self._raise("a bad operator")
            return
        world = self.member.world
        assert world is not None
        self.enter("reduce")
        me = self.info.worker_id
        groups = [g for g in sync_groups(world.layout, self.memory.model) if me in g.members]
        self.member.begin_sums(len(groups))
        self.torn_sums = True
        for group in groups:
            self.meet(group.name, group.members, self._sum_done)
        self._vote_if_ready()

    def _sum_done(self) -> None:
        self.member.sum_done()
        self.torn_sums = self.member.sums > 0
        self._vote_if_ready()

    def _vote_if_ready(self) -> None:
        world = self.member.world
        if self.phase != "reduce" or world is None or not self.member.may_vote:
            return
        self.enter("vote")
        self.member.prepare(world.generation, self.step)
        self.meet("vote", world.layout.members, lambda: None, ballot.cast(self, world))

    def voted(self, values: tuple[float, ...]) -> None:
        """The vote's all-reduce has returned here."""
        if self._saw(values):
            return
        if self.member.diverged is not None:
            self._broken("copies differ")
        else:
            self.park()

    def _saw(self, values: tuple[float, ...]) -> bool:
        assert self.member.world is not None
        summed, told = timing.split(self.member.world, self.step, values)
        vote = read_vote(self.member.generation, self.step, summed, ballot.parts(self))
        if not self.member.see(vote, told):
            return False
        self.memory.keep_only({h.shard for h in self.member.trained})
        self.member.begin_commit()
        self.work("commit", 0.01, lambda: self._committed(vote))
        return True

    def _committed(self, vote: Vote) -> None:
        if self._commit_raises():
            return
        self._write()
        report = self.member.end_commit(self.fleet.clock.now)
        if report is not None:
            self.fleet.send(self, report)
            self.fleet.moment(self, "reported")
        if self.alive:
            self._save(vote)
        if vote.mirrors and self.alive:
            world = self.member.world
            assert world is not None
            self.mirrorer.begin(world, Version(vote.step, vote.generation))
        if self.member.leaves(vote) or not self.member.running(vote.generation):
            self.park()
        else:
            self._begin_step()

    def _write(self) -> None:
        held, prepared, vote = self.member.held, self.member.prepared, self.member.saw
        assert held is not None and prepared is not None and vote is not None
        self.memory.advance(held.shard, prepared, whole=not self.torn_sums)
        self.fleet.checks.committed(self, prepared, vote)

    def _save(self, vote: Vote) -> None:
        """After the commit, before anything else is committed: copies what it writes of a checkpoint."""
        if not vote.saves:
            return
        self.fleet.moment(self, "saving")
        if self.alive:
            world = self.member.world
            assert world is not None
            version = Version(vote.step, vote.generation)
            self.writer.take(version, world, last=vote.step == world.last_step)

    def _commit_raises(self) -> bool:
        """Whoever fails in a commit has torn state, so it dies (rule 8)."""
        if not self.raises:
            return False
        assert self.member.held is not None
        self.memory.tear(self.member.held.shard)
        self.fleet.kill(self.info.worker_id, "its commit raised")
        return True

    def _finish(self, world: World) -> None:
        def written() -> None:
            finished = self.member.finished(None)
            if finished is not None:
                self.fleet.send(self, finished)
            self.park()

        self.enter("finish")
        self.meet("finish", world.layout.members, written)

    # ------------------------------------------------------------ training thread: trouble

    def broken(self) -> None:
        """A neighbour's death reaches the blocked collective."""
        self._broken("connection closed by peer")

    def _broken(self, error: str) -> None:
        self._fail(m.Fault(self.step, self.phase, 0, "", error, collective=True))

    def _unreadable(self, world: World) -> None:
        """The checkpoint of the world's base is damaged or missing, or is so to this worker."""
        assert self.fleet.store is not None
        me, file = self.info.worker_id, self.fleet.store.damaged_file(world.base)
        event = m.CheckpointUnreadable(me, world.generation, world.base, "not what was written", file)
        self.park()
        self.fleet.send(self, event)

    def _raise(self, error: str) -> None:
        self._fail(m.Fault(self.step, self.phase, 0, "block0", error, collective=False))

    def _fail(self, fault: m.Fault) -> None:
        generation = self.member.generation
        self.park()
        self.fleet.send(self, m.Failed(self.info.worker_id, generation, fault))
