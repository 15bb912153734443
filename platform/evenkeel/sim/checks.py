"""What must hold after every event of a simulated run (design, section 9). Each violation names itself."""

from typing import TYPE_CHECKING

from evenkeel.control import messages as m
from evenkeel.core.boxes import Box
from evenkeel.core.ids import INITIAL, Version, WorkerId
from evenkeel.core.layout import check_layout
from evenkeel.core.vote import Vote
from evenkeel.core.world import World
from evenkeel.plan.coverage import lost_slices
from evenkeel.plan.state import slices
from evenkeel.sim.memory import TORN, History

if TYPE_CHECKING:
    from evenkeel.sim.fleet import Fleet
    from evenkeel.sim.worker import SimWorker

MAX_QUEUE = 5000


class ViolationError(AssertionError):
    """An invariant does not hold."""


def require(holds: bool, what: str) -> None:
    if not holds:
        raise ViolationError(what)


class Checks:
    """Watches one run. `histories` is what is known of each version; `shown` the steps that became visible."""

    def __init__(self, fleet: "Fleet") -> None:
        self.fleet = fleet
        self.histories: dict[Version, History] = {INITIAL: ()}
        self.shown: list[Version] = []
        self.bases: dict[int, Version] = {}
        self.lost: set[WorkerId] = set()
        self.opened: set[int] = set()
        self.entries = 0

    def forget(self) -> None:
        """A new controller knows of a loss only if a decision that rests on it was written down."""
        settled = [e for e in self.fleet.journal if isinstance(e, m.StepSettled)]
        self.lost = {w for e in settled for w in e.lost}

    # ------------------------------------------------------------ what the controller shows and orders

    def visible(self, vote: Vote) -> None:
        step = len(self.shown) + 1
        require(vote.step == step, f"step {vote.step} became visible, expected {step}")
        self.shown.append(Version(vote.step, vote.generation))

    def commanded(self, command: m.Command) -> None:
        match command:
            case m.Form(worker_id, _, world):
                require(
                    worker_id not in self.lost,
                    f"{worker_id} is used in generation {world.generation} after it was lost",
                )
            case m.Settle(worker_id):
                require(worker_id not in self.lost, f"{worker_id} is settled after it was lost")
            case m.Log("worker_lost", fields=fields):
                self.lost.add(fields["worker_id"])
            case m.Kill(worker_id, reason):
                self._justified(worker_id, reason)
            case m.End(status, error):
                self._end(status, error)
            case _:
                pass

    def _justified(self, worker_id: WorkerId, reason: str) -> None:
        """Nobody is killed for nothing: only where messages are lost or late, or something hangs or is slow."""
        scenario = self.fleet.scenario
        troubled = {"hang", "cut", "slow", "suspect", "controller"} & {f.kind for f in scenario.faults}
        noisy = scenario.network.lose or scenario.network.late
        require(bool(troubled or noisy), f"healthy {worker_id} was killed: {reason}")

    def after_event(self) -> None:
        journal = self.fleet.journal
        for entry in journal[self.entries :]:
            if isinstance(entry, m.WorldOpened):
                self._opened(entry.world)
            elif isinstance(entry, m.StepSettled):
                self._settled(entry.decision)
        self.entries = len(journal)
        require(self.fleet.clock.pending < MAX_QUEUE, "the queue of messages grows without bound")

    def _opened(self, world: World) -> None:
        policy = self.fleet.scenario.policy
        require(world.generation not in self.opened, f"generation {world.generation} is used twice")
        self.opened.add(world.generation)
        check_layout(world.layout, policy.model.depth, policy.micro_batches)
        size = policy.wish
        require(size.min_workers <= world.size <= size.max_workers, f"world of {world.size} workers")
        self._extends_shown(world.base, f"generation {world.generation} begins")

    def _settled(self, decision: m.Decision) -> None:
        known = self.bases.setdefault(decision.generation, decision.base)
        require(
            known == decision.base, f"generation {decision.generation} is settled twice: {known} and {decision.base}"
        )
        self._extends_shown(decision.base, f"generation {decision.generation} is settled")

    def _extends_shown(self, base: Version, what: str) -> None:
        require(base.step >= len(self.shown) - 1 or base in self.shown, f"{what} at {base}, taking back {self.shown}")
        if self.shown and base.step >= self.shown[-1].step:
            require(
                base.step > self.shown[-1].step or base == self.shown[-1], f"{what} at {base}, not {self.shown[-1]}"
            )
        else:
            require(
                not self.shown, f"{what} at {base} although step {self.shown[-1].step if self.shown else 0} is visible"
            )

    # ------------------------------------------------------------ what workers do

    def covered(self, worker: "SimWorker", world: World, pieces: list[tuple[str, Box]]) -> None:
        """Transfers plus what is kept cover each wanted box exactly once."""
        wanted = slices(worker.memory.model, world.layout.shard(worker.info.worker_id))
        for want in wanted:
            left: list[Box] = [want.box]
            boxes = [box for tensor, box in pieces if tensor == want.tensor]
            for box in boxes:
                left = [rest for part in left for rest in part.subtract(box)]
            sizes = sum(box.size for box in boxes)
            require(not left and sizes == want.box.size, f"{worker.info.worker_id}: {want} is not covered exactly once")

    def joined(self, worker: "SimWorker", world: World) -> None:
        self._holds(worker, world.base, f"joins generation {world.generation}")

    def begins(self, worker: "SimWorker", world: World) -> None:
        """Nobody computes a step from a state that is torn, mixed, or not that of the step before."""
        held = worker.member.held
        name = f"{worker.info.worker_id} begins step {worker.step} of generation {world.generation}"
        require(held is not None and held.version is not None, f"{name} without a state")
        assert held is not None and held.version is not None
        require(held.version.step == worker.step - 1, f"{name} from {held.version}")
        self._holds(worker, held.version, name)

    def committed(self, worker: "SimWorker", version: Version) -> None:
        """All who commit a version have gone through the same history."""
        held = worker.member.held
        assert held is not None
        history = worker.memory.history(held.shard)
        name = f"{worker.info.worker_id} commits {version}"
        require(history is not TORN and history != TORN, f"{name} from torn or incomplete data")
        known = self.histories.setdefault(version, history)
        require(known == history, f"{name} with history {history}, others have {known}")
        if worker.info.worker_id not in self.lost:
            self._one_lineage(version, name)

    def _one_lineage(self, version: Version, name: str) -> None:
        """Of each step at most one generation's commit is in a member that counts, or visible."""
        alive = [w for w in self.fleet.workers.values() if w.alive and w.info.worker_id not in self.lost]
        held = {h.version for w in alive for h in w.member.holdings if h.version is not None}
        others = [v for v in (*held, *self.shown) if v.step == version.step and v != version]
        base = max((b for b in self.bases.values()), default=INITIAL)
        others = [v for v in others if v.step > base.step or v == base or v in self.shown]
        require(not others, f"{name}, but {others} of the same step is alive or visible")

    def _holds(self, worker: "SimWorker", version: Version, name: str) -> None:
        held = worker.member.held
        require(held is not None and held.version == version, f"{name}: it is labelled {held}, not {version}")
        assert held is not None
        history = worker.memory.history(held.shard)
        known = self.histories.get(version)
        require(known is None or history == known, f"{name}: its bytes are {history}, those of {version} are {known}")

    # ------------------------------------------------------------ the end

    def _end(self, status: str, error: str) -> None:
        policy = self.fleet.scenario.policy
        if status == "finished":
            require(
                len(self.shown) == policy.last_step, f"finished after {len(self.shown)} of {policy.last_step} steps"
            )
        elif "is lost" in error:
            self._really_lost()
        else:
            self._deserved(status, error)

    def _really_lost(self) -> None:
        """No committed step is lost while a copy of each piece of its state is alive."""
        step = len(self.shown)
        alive = [w for w in self.fleet.workers.values() if w.alive and w.info.worker_id not in self.lost]
        shards = [
            h.shard
            for w in alive
            for h in w.member.holdings
            if h.version is not None and h.version.step >= step and w.memory.history(h.shard) != TORN
        ]
        missing = lost_slices(self.fleet.scenario.policy.model, shards)
        require(bool(missing), f"step {step} was given up although all of it is alive")

    def _deserved(self, status: str, error: str) -> None:
        kinds = [f.kind for f in self.fleet.scenario.faults]
        breaking = sum(kinds.count(k) for k in ("crash", "node", "hang", "cut", "suspect", "slow"))
        deserved = (
            ("failed again" in error and kinds.count("exception") >= 2)
            or ("took workers down" in error and breaking >= 3)
            or ("cannot be started" in error and self.fleet.scenario.start_fails > 0)
            or ("not finite" in error and self.fleet.scenario.nonfinite > 0)
        )
        require(deserved, f"the run ended as {status}: {error}")
