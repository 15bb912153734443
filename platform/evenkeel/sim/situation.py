"""One situation of an exhaustively explored run: controller, workers, messages, and all that may come next."""

from collections.abc import Callable, Iterator
from copy import copy
from dataclasses import dataclass, field

from evenkeel.control import messages as m
from evenkeel.control.controller import Controller
from evenkeel.control.entries import Shown
from evenkeel.control.member import Member
from evenkeel.control.policy import Policy
from evenkeel.core.ids import INITIAL, NodeId, Version, WorkerId
from evenkeel.core.layout import WorkerInfo
from evenkeel.core.model import LayerShape, ModelShape, ParamShape
from evenkeel.plan.layout import Wish
from evenkeel.sim.snapshot import clone, freeze, token
from evenkeel.sim.unit import COLLECTIVES, Unit

ToWorker = m.Abort | m.Settle | m.Form | m.Request | m.Probe
Message = ToWorker | m.Event


@dataclass(frozen=True, slots=True)
class Bounds:
    """How large the run is, and how much may go wrong in it.

    Attributes:
        suspicions: live workers that are declared lost.
        errors: 1 if collectives may also break with an error, and look complete, when a member dies.
    """

    members: int = 2
    spares: int = 0
    steps: int = 1
    crashes: int = 1
    controller_crashes: int = 0
    suspicions: int = 0
    errors: int = 0


class StoryError(Exception):
    """Something that must hold does not. `what` is the move that broke it."""

    def __init__(self, text: str, what: str = "") -> None:
        super().__init__(text)
        self.what = what


@dataclass
class Situation:
    """Attributes:
    net: messages under way, as tokens; any may come next.
    arrived: who has put its part into a collective (generation, step, name).
    complete: votes to which all members gave their part.
    known: the history by which a version came about.
    lost: whom the controller of this life, or the journal, declared lost.
    """

    bounds: Bounds
    controller: Controller | None
    units: dict[WorkerId, Unit]
    epoch: int = 1
    net: frozenset[Message] = frozenset()
    arrived: dict[tuple[int, int, str], frozenset[WorkerId]] = field(default_factory=dict)
    complete: frozenset[tuple[int, int]] = frozenset()
    known: dict[Version, tuple[Version, ...]] = field(default_factory=lambda: {INITIAL: ()})
    journal: tuple[m.Entry, ...] = ()
    shown: tuple[m.Metrics, ...] = ()
    lost: frozenset[WorkerId] = frozenset()
    crashes: int = 0
    controller_crashes: int = 0
    suspicions: int = 0
    ended: str = ""

    @classmethod
    def first(cls, bounds: Bounds) -> "Situation":
        names = [WorkerId(f"w{i + 1}") for i in range(bounds.members + bounds.spares)]
        controller = Controller(policy_of(bounds), 1)
        situation = cls(bounds, controller, {name: Unit(Member(name)) for name in names})
        situation._carry(controller.step(0.0, m.Started(tuple(map(info_of, names)))), 1.0)
        return situation

    def key(self) -> object:
        """Equal for situations from which the same can happen."""
        state = freeze(self.controller._state) if self.controller is not None else None
        units = tuple(
            (u.at, u.alive, u.step, u.history, u.asked, u.settling, freeze(u.member)) for u in self.units.values()
        )
        live = {u.member.generation for u in self.units.values() if u.alive and u.at != "parked"}
        arrived = frozenset((k, who) for k, who in self.arrived.items() if k[0] in live)
        journal = tuple(token(e) for e in self.journal if not isinstance(e, m.EpochBegun))
        budgets = (self.crashes, self.controller_crashes, self.suspicions)
        net = frozenset(map(token, self.net))
        return state, units, net, arrived, journal, tuple(map(token, self.shown)), self.lost, budgets, self.ended

    def copy(self) -> "Situation":
        after = copy(self)
        after.units, after.arrived, after.known = dict(self.units), dict(self.arrived), dict(self.known)
        return after

    @property
    def anybody_left(self) -> bool:
        return any(u.alive and n not in self.lost for n, u in self.units.items())

    # ------------------------------------------------------------ what may come next

    def moves(self) -> Iterator[tuple[str, "Situation"]]:
        """Every move with the situation after it. Raises StoryError where that is wrong."""
        for what, after in self._all_moves():
            try:
                after.check()
            except StoryError as error:
                raise StoryError(str(error), what) from None
            yield what, after

    def _all_moves(self) -> Iterator[tuple[str, "Situation"]]:
        for name, unit in self.units.items():
            if unit.alive:
                yield from self._unit_moves(name, unit)
                if self.crashes < self.bounds.crashes:
                    yield f"{name} crashes at {unit.at} of step {unit.step}", self._crash(name)
                if self.suspicions < self.bounds.suspicions and name not in self.lost:
                    after = self._with_messages((m.WorkerLost(name, "suspected"),))
                    after.suspicions += 1
                    yield f"{name} is suspected", after
        if self.controller is None:
            yield "the controller restarts", self._restart()
        for message in sorted(self.net, key=token):
            yield from self._deliver(message)

    def _unit_moves(self, name: WorkerId, unit: Unit) -> Iterator[tuple[str, "Situation"]]:
        if unit.told_to_abort:
            yield f"{name} parks", self._do(name, Unit.park)
            if unit.at == "vote":
                # NCCL's abort may return success with a buffer that looks complete (rule 2).
                yield f"{name} is told by its abort that the vote is complete", self._do(name, lie)
        if unit.at == "step":
            yield f"{name} begins step {unit.step + 1}", self._do(name, Unit.begin_step)
        elif unit.at in ("commit", "settle"):
            yield f"{name} ends its commit of step {unit.step}", self._commit(name)
        elif unit.at in COLLECTIVES:
            yield from self._collective_moves(name, unit)

    def _collective_moves(self, name: WorkerId, unit: Unit) -> Iterator[tuple[str, "Situation"]]:
        here = self.arrived.get(place(unit), frozenset())
        members = set(unit.world.layout.members)
        if members <= here:
            yield f"{name} is through {COLLECTIVES[unit.at]} of step {unit.step}", self._through(name, unit)
        elif self.bounds.errors and any(not self.units[w].alive for w in members):
            yield f"{name} has an error in {COLLECTIVES[unit.at]}", self._do(name, Unit.broken)
            if unit.at == "vote":
                yield f"{name} reads a part of the vote", self._do(name, lambda u: u.see(u.vote(len(here))))

    def _through(self, name: WorkerId, unit: Unit) -> "Situation":
        match unit.at:
            case "join":
                return self._do(name, lambda u: u.reshard(self.units))
            case "sum":
                return self._do(name, Unit.summed)
            case "vote":
                return self._do(name, lambda u: u.see(u.vote(u.world.size)))
            case _:
                return self._do(name, Unit.finished)

    def _do(self, name: WorkerId, act: Callable[[Unit], object]) -> "Situation":
        """A worker acts: what it sends is under way, and where it waits now it has put in its part."""
        after = self.copy()
        unit = after.units[name] = self.units[name].copy()
        act(unit)
        after.net |= frozenset(unit.out)
        unit.out = []
        if unit.at in COLLECTIVES:
            at = place(unit)
            after.arrived[at] = after.arrived.get(at, frozenset()) | {name}
            if unit.at == "vote" and set(unit.world.layout.members) <= after.arrived[at]:
                after.complete |= {at[:2]}
        return after

    def _commit(self, name: WorkerId) -> "Situation":
        after = self._do(name, Unit.end_commit)
        history = after.units[name].history
        version = history[-1]
        known = after.known.setdefault(version, history)
        require(known == history, f"{name} commits {version} with {history}, others with {known}")
        at = (version.generation, version.step)
        require(at in self.complete, f"{name} commits {version} without a complete vote")
        bases = {e.decision.generation: e.decision.base for e in self.journal if isinstance(e, m.StepSettled)}
        base = bases.get(version.generation)
        counts = base is None or version <= base or name in self.lost
        require(counts, f"{name} commits {version}, its generation was settled at {base}")
        return after

    def _crash(self, name: WorkerId) -> "Situation":
        after = self._with_messages((m.WorkerLost(name, "crash"),))
        unit = after.units[name] = self.units[name].copy()
        unit.alive = False
        after.net = frozenset(x for x in after.net if not isinstance(x, ToWorker) or x.worker_id != name)
        after.crashes += 1
        return after

    def _with_messages(self, messages: tuple[m.Event, ...]) -> "Situation":
        after = self.copy()
        after.net |= frozenset(messages)
        return after

    # ------------------------------------------------------------ messages

    def _deliver(self, message: Message) -> Iterator[tuple[str, "Situation"]]:
        if isinstance(message, ToWorker):
            if self.units[message.worker_id].alive:
                after = self._do(message.worker_id, lambda u: u.hear(message))
                after.net -= {message}
                yield f"{message.worker_id} hears {brief(message)}", after
        elif self.controller is not None:
            parts = (1.0, 0.0, 0.5) if self.controller_crashes < self.bounds.controller_crashes else (1.0,)
            yield f"the controller hears {brief(message)}", self._hear(message, 1.0)
            for part in parts[1:]:
                after = self._hear(message, part)
                after.controller, after.controller_crashes = None, self.controller_crashes + 1
                yield f"the controller hears {brief(message)} and dies after {part:.0%} of its commands", after

    def _hear(self, message: m.Event, part: float) -> "Situation":
        assert self.controller is not None
        after = self.copy()
        after.net -= {message}
        after.controller = Controller.__new__(Controller)
        after.controller._state = clone(self.controller._state)
        after._carry(after.controller.step(0.0, message), part)
        return after

    def _restart(self) -> "Situation":
        after = self.copy()
        after.epoch += 1
        if self.journal and isinstance(self.journal[-1], m.RunEnded):
            # The shell sees this in the journal and carries out what was decided.
            after._end(self.journal[-1].status, self.journal[-1].error)
            return after
        witness = self.shown[-1].vote if self.shown else None
        after.controller = Controller(policy_of(self.bounds), after.epoch, self.journal, Shown(witness))
        after.lost = frozenset(w for e in self.journal if isinstance(e, m.StepSettled) for w in e.lost)
        alive = tuple(info_of(name) for name, unit in self.units.items() if unit.alive)
        after._carry(after.controller.step(0.0, m.Started(alive)), 1.0)
        return after

    def _carry(self, output: m.Output, part: float) -> None:
        """Makes the journal durable and starts the first part of the commands, in order."""
        for entry in output.journal:
            self._journalled(entry)
        for command in output.commands[: int(part * len(output.commands))]:
            match command:
                case m.Metrics():
                    self._show(command)
                case m.Log("worker_lost", fields=told):
                    self.lost |= {told["worker_id"]}
                case m.End(status, error):
                    self._end(status, error)
                case m.SetTimer(at) if at <= 0.0:
                    self.net |= {m.Tick()}
                case _ if isinstance(command, ToWorker):
                    require(
                        command.worker_id not in self.lost, f"{brief(command)} to {command.worker_id}, which is lost"
                    )
                    if self.units[command.worker_id].alive:
                        self.net |= {command}
                case _:
                    pass

    # ------------------------------------------------------------ what must hold

    def _journalled(self, entry: m.Entry) -> None:
        if isinstance(entry, m.WorldOpened):
            worlds = [e.world.generation for e in self.journal if isinstance(e, m.WorldOpened)]
            require(
                entry.world.generation > max(worlds, default=0), f"{entry.world.generation} is opened after {worlds}"
            )
            self._in_line(entry.world.base, "the base of a world")
        elif isinstance(entry, m.StepSettled):
            settled = [e.decision.generation for e in self.journal if isinstance(e, m.StepSettled)]
            require(entry.decision.generation not in settled, f"{entry.decision.generation} is settled twice")
            self._in_line(entry.decision.base, "a decision")
        self.journal = (*self.journal, entry)

    def _in_line(self, version: Version, what: str) -> None:
        shown = tuple(Version(c.vote.step, c.vote.generation) for c in self.shown)
        last = shown[-1] if shown else INITIAL
        require(version.step > last.step or version == last, f"{what}, {version}, takes back {last}")
        history = self.known.get(version)
        in_line = history is None or history[: len(shown)] == shown
        require(in_line, f"{what}, {version}, came about by {history}; visible are {shown}")

    def _show(self, metrics: m.Metrics) -> None:
        vote = metrics.vote
        require(vote.step == len(self.shown) + 1, f"step {vote.step} became visible after {len(self.shown)}")
        require((vote.generation, vote.step) in self.complete, f"step {vote.step} is shown without a complete vote")
        bases = {e.decision.generation: e.decision.base for e in self.journal if isinstance(e, m.StepSettled)}
        base = bases.get(vote.generation)
        version = Version(vote.step, vote.generation)
        require(base is None or version <= base, f"{version} is shown, its generation was settled at {base}")
        self._in_line(version, "what is shown")
        self.shown = (*self.shown, metrics)

    def check(self) -> None:
        """Of each step at most one generation's commit is in a worker that counts, or visible."""
        versions = {Version(c.vote.step, c.vote.generation) for c in self.shown}
        for name, unit in self.units.items():
            if unit.alive and name not in self.lost:
                versions |= {h.version for h in unit.member.holdings if h.version is not None}
        require(len({v.step for v in versions}) == len(versions), f"one step of two generations is alive: {versions}")

    def _end(self, status: str, error: str) -> None:
        self.ended = status if status != "failed" else f"failed: {error.split(':')[0]}"
        if status == "finished":
            require(len(self.shown) == self.bounds.steps, f"finished after {len(self.shown)} steps")
        elif "is lost" in error:
            holders = [u for n, u in self.units.items() if u.alive and n not in self.lost]
            alive = any(h.version and h.version.step >= len(self.shown) for u in holders for h in u.member.holdings)
            require(not alive, f"given up although somebody holds it: {error}")
        else:
            raise StoryError(f"the run ended as {status}: {error}")


def require(holds: bool, what: str) -> None:
    if not holds:
        raise StoryError(what)


def lie(unit: Unit) -> None:
    unit.see(unit.vote(unit.world.size))


def place(unit: Unit) -> tuple[int, int, str]:
    return unit.member.generation, unit.step, COLLECTIVES[unit.at]


def brief(message: object) -> str:
    match message:
        case m.Form(_, epoch, world):
            return f"Form {world.generation} of {','.join(world.layout.members)} from {world.base} (epoch {epoch})"
        case m.Settle(_, epoch, _, decision):
            return f"Settle {decision.generation} at {decision.base} (epoch {epoch})"
        case m.Abort(_, epoch, generation):
            return f"Abort {generation} (epoch {epoch})"
        case m.Answered(worker, generation, ask, answer):
            saw = answer.saw.step if answer.saw else None
            held = [h.version for h in answer.held]
            return f"{worker}'s answer {ask} to {generation}: held {held}, prepared {answer.prepared}, saw {saw}"
        case m.Reported(worker, reports):
            return f"{worker}'s report of {[(r.vote.generation, r.vote.step) for r in reports]}"
        case _:
            return str(message)


def info_of(name: WorkerId) -> WorkerInfo:
    return WorkerInfo(name, NodeId("a"), 1)


def policy_of(bounds: Bounds) -> Policy:
    model = ModelShape((LayerShape("block", (ParamShape("weight", (2,)),)),))
    wish = Wish(bounds.members, 1, 1, 1, bounds.members)
    return Policy(model, wish, bounds.members, bounds.steps, bounds.spares, gather_s=0.0)
