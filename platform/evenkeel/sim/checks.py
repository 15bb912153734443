"""What must hold after every event of a simulated run (design, section 9). Each violation names itself."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from evenkeel.control import messages as m
from evenkeel.core.boxes import Box
from evenkeel.core.ids import INITIAL, Version, WorkerId
from evenkeel.core.layout import check_layout
from evenkeel.core.vote import Slot, Vote
from evenkeel.core.world import World
from evenkeel.plan.copies import shards_in
from evenkeel.plan.coverage import lost_slices
from evenkeel.plan.state import slices
from evenkeel.sim.balanced import BalanceChecks
from evenkeel.sim.ballot import TOKENS
from evenkeel.sim.corruption import Corruption
from evenkeel.sim.memory import TORN, History
from evenkeel.sim.mirrored import MirrorChecks
from evenkeel.sim.saved import SavedChecks
from evenkeel.sim.violation import ViolationError, require

if TYPE_CHECKING:
    from evenkeel.sim.fleet import Fleet
    from evenkeel.sim.worker import SimWorker

QUEUE_PER_WORKER = 40
"""Messages and timers under way, for each worker ever started. The most that was seen without a bug is 13."""
STEPS_TO_STOP = 2
"""That may become visible after a stop is asked for: one is under way, for another the request may be too late."""


BREAKING = ("crash", "node", "all", "hang", "cut", "suspect", "slow", "exception")


class Checks:
    """Watches one run.

    Attributes:
        histories: what is known of each version: the committed steps that made it.
        shown: the versions that are visible, one for each step; ever_shown: also those of before the run went back.
        bases: what each settled generation was settled at; base: what the next world must begin from.
        lost: workers that the controller of this life, or a journalled decision, declared lost.
        worlds: those that are journalled, by generation.
    """

    def __init__(self, fleet: "Fleet") -> None:
        self.fleet = fleet
        self.histories: dict[Version, History] = {INITIAL: ()}
        self.shown: list[Version] = []
        self.ever_shown: set[Version] = set()
        self.bases: dict[int, Version] = {}
        self.base = INITIAL
        self.after_stop = 0
        self.lost: set[WorkerId] = set()
        self.worlds: dict[int, World] = {}
        self.entries = 0
        self.saved = SavedChecks(self)
        self.corruption = Corruption(self)
        self.mirrors = MirrorChecks(self)
        self.balance = BalanceChecks(fleet)

    def forget(self) -> None:
        """A new controller knows of a loss only if a decision that rests on it was written down."""
        settled = [e for e in self.fleet.journal if isinstance(e, m.StepSettled)]
        self.lost = {w for e in settled for w in e.lost}

    @property
    def _last(self) -> Version:
        return self.shown[-1] if self.shown else INITIAL

    def counts(self) -> list["SimWorker"]:
        """Workers that are alive and were not declared lost."""
        return [w for i, w in self.fleet.workers.items() if w.alive and i not in self.lost]

    def is_gone(self, version: Version) -> bool:
        return self.saved.is_gone(version)

    def is_lost(self, step: int) -> bool:
        """Whether no copy of some piece of the state of this step is alive."""
        shards = [
            h.shard
            for w in self.counts()
            for h in w.member.holdings
            if h.version is not None
            and h.version.step >= step
            and not self.is_gone(h.version)
            and (h.mirror or w.memory.history(h.shard) != TORN)
        ]
        return bool(lost_slices(self.fleet.scenario.policy.model, shards))

    # ------------------------------------------------------------ what the controller shows

    def visible(self, vote: Vote) -> None:
        """A line of metrics: the next step, of the one lineage, with every sample of its batch counted once."""
        version = Version(vote.step, vote.generation)
        require(vote.step == len(self.shown) + 1, f"{version} became visible, expected step {len(self.shown) + 1}")
        require(vote.generation in self.worlds, f"{version} became visible, of a generation that is not journalled")
        base = self.bases.get(vote.generation)
        require(base is None or version <= base, f"{version} became visible, but its generation was settled at {base}")
        self.shown.append(version)
        self.ever_shown.add(version)
        self.mirrors.voted(vote)
        self._in_line(version, "what became visible")
        world = self.worlds[vote.generation]
        true = self.fleet.meetings.votes.get((vote.generation, vote.step))
        require(vote.complete(world.size), f"{version} became visible with the incomplete vote {vote.values}")
        require(vote.values == true, f"{version} became visible with the vote {vote.values}, its members sum to {true}")
        expected = TOKENS * self.fleet.scenario.policy.micro_batches
        tokens = vote.values[Slot.TOKENS]
        self.balance.visible(vote, world)
        require(tokens == expected, f"{version} counts {tokens} tokens, its batch has {expected}")
        asked = self.fleet.stop_asked_at
        struck = any(w.struck - {"crash"} for w in self.fleet.workers.values())
        prompt = self.fleet.scenario.calm and not self.fleet.scenario.late_reports
        undisturbed = prompt and self.fleet.life == 1 and not self.bases and not struck
        # It waits while a checkpoint is being written.
        self.after_stop += asked is not None and not vote.values[Slot.BUSY]
        late = self.after_stop > STEPS_TO_STOP
        require(not (late and undisturbed), f"step {vote.step} became visible, a stop was asked for at {asked}")

    def unshown(self, votes: Sequence[Vote]) -> None:
        """The last lines are lost with the controller: their steps are shown again, or gone if it went back since."""
        for vote in reversed(votes):
            if self._last == Version(vote.step, vote.generation):
                self.shown.pop()

    def _in_line(self, version: Version, what: str) -> None:
        """Whether a version goes on from all that is visible."""
        last = self._last
        require(not self.is_gone(version), f"{what}, {version}, is of a line that was given up")
        require(version.step > last.step or version == last, f"{what}, {version}, takes back {last}")
        history = self.histories.get(version)
        shown = tuple(self.shown)
        if history is not None:
            require(history[: len(shown)] == shown, f"{what}, {version}, came about by {history}; visible are {shown}")

    # ------------------------------------------------------------ what the controller orders

    def commanded(self, command: m.Command) -> None:
        match command:
            case m.Form(worker_id, _, world):
                generation = world.generation
                require(worker_id not in self.lost, f"{worker_id} is used in generation {generation} after it was lost")
                # Journal entries of an event come before its commands.
                written = [e.world for e in self.fleet.journal if isinstance(e, m.WorldOpened)]
                require(world in written, f"generation {generation} is used before it is journalled")
            case m.Settle(worker_id, _, _, decision):
                require(worker_id not in self.lost, f"{worker_id} is settled after it was lost")
                decisions = [e.decision for e in self.fleet.journal if isinstance(e, m.StepSettled)]
                require(decision in decisions, f"{decision} is told before it is journalled")
            case m.Log("worker_lost", fields=fields):
                self.lost.add(fields["worker_id"])
            case m.Log("restored"):
                self.written()
                self.saved.logged(command)
            case m.Log("rebalanced"):
                self.written()
                self.balance.rebalanced()
            case m.Log():
                self.saved.logged(command)
            case m.Kill(worker_id, reason):
                self._justified(worker_id, reason)
            case m.Start(count):
                self._wanted(count)
            case m.LookAt(version, file):
                self.saved.awaited.add((version, file))
            case m.End(status, error):
                self._end(status, error)
            case _:
                pass

    def _justified(self, worker_id: WorkerId, reason: str) -> None:
        """Nobody is killed for nothing: only where messages are lost or late, or something hangs or is slow."""
        if "silent corruption" in reason:
            # The majority may have its content from the one whose bits have flipped.
            require(bool(self.corruption.since), f"{worker_id} was killed: {reason}, though no bit has flipped")
            return
        if "which is whole" in reason:
            store = self.fleet.store
            misread = store is not None and not store.reads.get(worker_id, True)
            require(misread, f"{worker_id}, which can read it, was killed: {reason}")
            return
        if "declared lost" in reason:
            require(worker_id in self.lost, f"{worker_id} was killed: {reason}, but no decision says so")
            return
        struck = {"hang", "cut", "slow", "suspect"} & self.fleet.workers[worker_id].struck
        network = self.fleet.scenario.network
        # Probes and worlds are sent again; but an abort or a decision that is lost looks like a worker that hangs.
        excuse = network.late or (network.lose and "no progress" not in reason)
        require(bool(struck or excuse), f"healthy {worker_id} was killed: {reason}")

    def _wanted(self, count: int) -> None:
        """No more workers than were asked for."""
        wanted = self.fleet.scenario.policy.wish.max_workers + self.fleet.scenario.policy.spares
        assert self.fleet.controller is not None
        roster = self.fleet.controller.roster
        processes = [i for i, w in self.fleet.workers.items() if w.alive and i not in roster.gone - roster.dying]
        here = len(processes) + self.fleet.failing
        require(here + count <= wanted, f"{count} started beside {here} of {wanted}")

    # ------------------------------------------------------------ what the controller writes down

    def after_event(self) -> None:
        self.written()
        self.saved.bounded()
        most = QUEUE_PER_WORKER * (1 + len(self.fleet.workers))
        require(self.fleet.clock.pending <= most, f"{self.fleet.clock.pending} messages and timers are under way")
        for worker in self.fleet.workers.values():
            held = worker.member.held
            torn = worker.alive and worker.member.parked and held is not None and held.version is None
            require(not torn, f"{worker.info.worker_id} lives on with what a failed commit has left")

    def written(self) -> None:
        """Looks at the new entries. A line that says that the run goes back stands where that was written down, among
        the other commands of one event; so what becomes visible before it is of before."""
        for entry in self.fleet.journal[self.entries :]:
            before = self.fleet.journal[self.entries - 1] if self.entries else None
            over = isinstance(before, m.RunEnded) and not isinstance(entry, m.EpochBegun)
            require(not over, f"{entry} is written down after the end")
            self.entries += 1
            if isinstance(entry, m.WorldOpened):
                self._opened(entry.world)
            elif isinstance(entry, m.StepSettled):
                self._settled(entry)
            elif isinstance(entry, m.Restored):
                self.saved.restored(entry)

    def _opened(self, world: World) -> None:
        policy, generation = self.fleet.scenario.policy, world.generation
        newest = max(self.worlds, default=0)
        require(generation > newest, f"generation {generation} is opened after {newest}")
        check_layout(world.layout, policy.model.depth, policy.micro_batches)
        wish = policy.wish
        require(wish.min_workers <= world.size <= wish.max_workers, f"world of {world.size} workers")
        self._in_line(world.base, f"the base of generation {generation}")
        require(self.base == world.base, f"generation {generation} begins from {world.base}, not {self.base}")
        self.saved.opened(world)
        self.corruption.opened(world)
        self.mirrors.opened(world)
        self.balance.opened(world, self.worlds.get(newest))
        if newest:
            require(newest in self.bases, f"generation {generation} is opened before {newest} is settled")
            change = world.size - self.worlds[newest].size
            self.fleet.seen["fewer copies"] += world.copies is not None
            self.fleet.seen["grow" if change > 0 else "shrink" if change < 0 else "same size"] += 1
            scenario = self.fleet.scenario
            troubled = scenario.faults or scenario.start_fails or not scenario.calm
            require(
                bool(troubled) or world.cause in ("pause", "rebalance"),
                f"{world.cause} broke a world without any fault",
            )
        self.worlds[generation] = world

    def _settled(self, entry: m.StepSettled) -> None:
        decision = entry.decision
        generation = decision.generation
        require(generation not in self.bases, f"generation {generation} is settled twice")
        self.bases[generation] = self.base = decision.base
        self._in_line(decision.base, f"the decision for generation {generation}")
        self.corruption.settled(entry, self.worlds[generation])
        for worker_id in entry.evidence:
            worker = self.fleet.workers[WorkerId(worker_id)]
            require(worker_id not in entry.lost, f"the decision for {generation} rests on {worker_id}, which is lost")
            promised = worker.member.floor > generation and (worker.member.parked or not worker.alive)
            require(promised, f"generation {generation} is settled while {worker_id} has not parked")

    # ------------------------------------------------------------ what workers do

    def covered(self, worker: "SimWorker", world: World, pieces: list[tuple[str, Box]]) -> None:
        """Transfers plus what is kept cover each wanted box exactly once."""
        wanted = slices(worker.memory.model, shards_in(world, worker.memory.model)[worker.info.worker_id])
        for want in wanted:
            left: list[Box] = [want.box]
            boxes = [box for tensor, box in pieces if tensor == want.tensor]
            for box in boxes:
                left = [rest for part in left for rest in part.subtract(box)]
            sizes = sum(box.size for box in boxes)
            require(not left and sizes == want.box.size, f"{worker.info.worker_id}: {want} is not covered exactly once")

    def joined(self, worker: "SimWorker", world: World) -> None:
        self._holds(worker, world.base, f"{worker.info.worker_id} joins generation {world.generation}")
        self.corruption.joined(worker)

    def begins(self, worker: "SimWorker", world: World) -> None:
        """Nobody computes a step from a state that is torn, mixed, or not that of the step before."""
        held = worker.member.held
        name = f"{worker.info.worker_id} begins step {worker.step} of generation {world.generation}"
        require(held is not None and held.version is not None, f"{name} without a state")
        assert held is not None and held.version is not None
        require(held.version.step == worker.step - 1, f"{name} from {held.version}")
        self._holds(worker, held.version, name)

    def committed(self, worker: "SimWorker", version: Version, vote: Vote) -> None:
        """All who commit a version came to it by one history, and nothing is committed beside a decision."""
        held = worker.member.held
        assert held is not None
        history = worker.memory.history(held.shard, self._expected(version))
        name = f"{worker.info.worker_id} commits {version}"
        require(TORN[0] not in history, f"{name} from torn or incomplete data")
        true = self.fleet.meetings.votes.get((version.generation, version.step))
        require(vote.values == true, f"{name} with the vote {vote.values}, its members sum to {true}")
        self.corruption.committed(worker, version, vote)
        known = self.histories.setdefault(version, history)
        if known != history:  # so often that the text is made only where it is needed
            raise ViolationError(f"{name} with history {history}, others have {known}")
        if worker.info.worker_id not in self.lost:
            self._one_lineage(version, name)
            base = self.bases.get(version.generation)
            require(base is None or version <= base, f"{name}, but its generation was settled at {base}")

    def _expected(self, version: Version) -> History:
        """What a worker that owns nothing would have: what others have, or what follows from the step before."""
        before = [v for v in self.histories if v.step == version.step - 1 and not self.is_gone(v)]
        # Of several the newest: a step that was dropped is committed again by a later generation.
        known = self.histories[max(before)] if before else ()
        return self.histories.get(version, (*known, version))

    def _one_lineage(self, version: Version, name: str) -> None:
        """Of each step at most one generation's commit is in a member that counts, or visible."""
        require(not self.is_gone(version), f"{name}, of a line that was given up")
        held = {h.version for w in self.counts() for h in w.member.trained if h.version is not None}
        held = {v for v in held if not self.is_gone(v)}
        others = [v for v in (*held, *self.shown) if v.step == version.step and v != version]
        require(not others, f"{name}, but {others} of the same step is alive or visible")

    def _holds(self, worker: "SimWorker", version: Version, name: str) -> None:
        held = worker.member.held
        require(held is not None and held.version == version, f"{name}: it is labelled {held}, not {version}")
        assert held is not None
        known = self.histories.get(version)
        history = worker.memory.history(held.shard, known)
        if history != known:
            raise ViolationError(f"{name}: its bytes are {history}, those of {version} are {known}")

    # ------------------------------------------------------------ the end

    def _end(self, status: str, error: str) -> None:
        policy, now = self.fleet.scenario.policy, self.fleet.clock.now
        by = self.fleet.scenario.ends_by
        require(now <= by, f"it took until {now:.1f} s, with faults that are noticed at once {by:.1f} s are enough")
        steps = len(self.shown)
        if status == "finished":
            require(steps == policy.last_step, f"finished after {steps} of {policy.last_step} steps")
            self._all_hold_what_is_visible()
        elif status == "stopped":
            require(self.fleet.stop_asked_at is not None, f"stopped, but nobody asked: {error}")
        elif "is lost" in error:
            step = len(self.shown)
            require(self.is_lost(step), f"step {step} was given up although all of it is alive")
            self.saved.nothing_usable()
            self.mirrors.nothing_promised()
        else:
            self._deserved(status, error)
        self.saved.ended(status, error)

    def _all_hold_what_is_visible(self) -> None:
        """The run's result: in every member, one history, the visible one."""
        world = self.worlds[max(self.worlds)]
        for worker in self.counts():
            held = worker.member.held
            if worker.info in world.members and worker.member.world == world:
                assert held is not None
                history = worker.memory.history(held.shard, tuple(self.shown))
                require(history == tuple(self.shown), f"{worker.info.worker_id} ends with {history}, not {self.shown}")

    def _deserved(self, status: str, error: str) -> None:
        kinds = [f.kind for f in self.fleet.scenario.faults]
        breaking = sum(kinds.count(k) for k in BREAKING)
        deserved = (
            ("failed again" in error and kinds.count("exception") >= 2)
            or ("took workers down" in error and breaking >= 3)
            or ("cannot be started" in error and self.fleet.scenario.start_fails > 0)
            or (" differ" in error and bool(self.corruption.since))
            or ("not finite" in error and self.fleet.scenario.nonfinite > 0)
            or self.saved.deserves(error)
        )
        require(deserved, f"the run ended as {status}: {error}")
