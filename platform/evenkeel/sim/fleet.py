"""The simulated shell: carries events and commands, starts and kills workers, keeps the journal, brings the faults."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from random import Random

from evenkeel.control import messages as m
from evenkeel.control.controller import Controller
from evenkeel.control.entries import Shown
from evenkeel.core.ids import INITIAL, NodeId, Version, WorkerId
from evenkeel.core.layout import WorkerInfo
from evenkeel.sim.checks import Checks
from evenkeel.sim.clock import Clock
from evenkeel.sim.lines import Lines
from evenkeel.sim.meetings import Meetings
from evenkeel.sim.moments import moments
from evenkeel.sim.scenario import MODES, SAVING_MOMENTS, Fault, Scenario
from evenkeel.sim.store import Store
from evenkeel.sim.worker import SimWorker

Command = m.Abort | m.Settle | m.Form | m.Request | m.Probe


@dataclass
class Armed:
    """A fault that waits for its moment to come `count` more times."""

    fault: Fault
    count: int


class Fleet:
    """A run of one scenario. `ended` is the End command that closed it; `seen` counts what is worth telling of it."""

    def __init__(self, scenario: Scenario) -> None:
        self.scenario = scenario
        self.rng = Random(scenario.seed + 1)
        self.clock = Clock()
        self.mischief = Random(f"{scenario.seed} mischief")
        self.meetings = Meetings(self.rng, self.mischief, scenario.lying, scenario.skew)
        self.mirrored = Random(f"{scenario.seed} mirrored")
        storage = scenario.storage
        self.store = Store(self, Random(f"{scenario.seed} storage"), storage) if storage is not None else None
        self.checks = Checks(self)
        self.workers: dict[WorkerId, SimWorker] = {}
        self.journal: list[m.Entry] = []
        self.metrics = Lines(storage.lines_at_once if storage is not None else 1)
        self.lines: list[str] = []
        self.ended: m.End | None = None
        self.controller: Controller | None = None
        self.seen: Counter[str] = Counter()
        self.life = 0
        self.watched: set[WorkerId] = set()
        """Whose death this life of the controller would hear of: those that it found or started."""
        self.timer = 0
        self.failing = 0
        self.stop_asked_at: int | None = None
        self.armed = [Armed(f, f.countdown) for f in scenario.faults if f.at is None]
        for fault in scenario.faults:
            if fault.at is not None:
                self.clock.after(fault.at, self._strike_somebody(fault))
        self.start_controller()

    # ------------------------------------------------------------ the controller's shell

    def start_controller(self) -> None:
        self.life += 1
        self.failing = 0
        self.checks.forget()
        if self.journal and isinstance(self.journal[-1], m.RunEnded):
            # As the Ray shell does: what was decided is carried out, and no new life begins.
            self.ended = m.End(self.journal[-1].status, self.journal[-1].error)
            self.checks.commanded(self.ended)
            return
        shown = Shown.of(reversed(self.metrics.votes))
        self.controller = Controller(self.scenario.policy, self.life, self.journal, shown)
        for worker in [w for w in self.workers.values() if w.alive and not w.ready]:
            # As the Ray shell does: whoever was still starting is ended, the new life starts its own.
            worker.alive = False
        alive = tuple(w.info for w in self.workers.values() if w.alive)
        self.watched = {info.worker_id for info in alive}
        self.seen[f"controller begins in {type(self.controller.mode).__name__}"] += self.life > 1
        saved = self.store.listed() if self.store is not None else ()
        resume = self._asked_back(saved) if not alive else None
        self.checks.saved.begins(saved, resume)
        self.hear(m.Started(alive, saved, resume=resume))
        if self.stop_asked_at is not None:
            # Requests are not journalled: who asked for a stop goes on asking until the run has ended.
            self.hear(m.StopRequested("asked"))

    def _asked_back(self, saved: tuple[Version, ...]) -> Version | None:
        """What who submits the run again wants to begin from; mostly the newest there is."""
        if self.store is None or not self.metrics.votes or self.store.rng.random() >= self.store.storage.asked_back:
            return None
        return self.store.rng.choice((INITIAL, *(v for v in saved if not self.checks.is_gone(v))))

    def hear(self, event: m.Event) -> None:
        """The controller takes an event: journal first, then the commands, in order."""
        controller = self.controller
        if controller is None or self.ended is not None:
            return
        mode = type(controller.mode).__name__
        self.lines.append(f"{self.clock.now:.6f} {event}")
        self.checks.saved.hears(event)
        output = controller.step(self.clock.now, event)
        entered = type(controller.mode).__name__
        come = [entered] if entered != mode else []
        come += moments(event, output.commands)
        stop_after = next((x for x in map(self._controller_dies, come) if x is not None), None)
        self.journal.extend(output.journal[: self._durable(output, stop_after)])
        for i, command in enumerate(output.commands):
            if stop_after is not None and i >= stop_after * len(output.commands):
                break
            self.checks.commanded(command)
            self.metrics.before(command)
            self._carry_out(command)
        if stop_after is not None and self.ended is None:
            # It had taken these for lost when it wrote its journal, though it did not live to say so.
            lines = [c for c in output.commands if isinstance(c, m.Log)]
            self.checks.lost |= {line.fields["worker_id"] for line in lines if line.event == "worker_lost"}
            self.crash_controller()
        self.checks.after_event()

    def _durable(self, output: m.Output, stop_after: float | None) -> int:
        """How many journal entries are written: a controller that dies before its first command may die before that."""
        if stop_after != 0.0 or self.store is None or self.store.rng.random() < 0.5:
            return len(output.journal)
        return self.store.rng.randint(0, len(output.journal))

    def _controller_dies(self, mode: str) -> float | None:
        """Whether a fault lets the controller die on entering this mode, and after which part of its commands."""
        for armed in self.armed:
            if armed.fault.kind == "controller" and armed.fault.moment == mode and armed.count > 0:
                armed.count -= 5
                if armed.count <= 0:
                    self.seen[f"controller dies at {mode}"] += mode not in MODES
                    return self.rng.choice((0.0, 0.5, 1.0))
        return None

    def crash_controller(self) -> None:
        self.seen[f"controller dies in {self.mode}"] += 1
        self.controller = None
        lost = self.metrics.lose()
        self.checks.unshown(lost)
        self.seen["lines lost with the controller"] += bool(lost)
        if self.store is not None:
            self.store.controller_died()
        self.clock.after(self.rng.uniform(0.05, 1.0), self._restart)

    @property
    def mode(self) -> str:
        """The controller's, by name; "no controller" between two of its lives."""
        return type(self.controller.mode).__name__ if self.controller is not None else "no controller"

    def _restart(self) -> None:
        if self.controller is None and self.ended is None:
            self.start_controller()

    def _carry_out(self, command: m.Command) -> None:
        match command:
            case m.Abort() | m.Settle() | m.Form() | m.Request() | m.Probe():
                self._to_worker(command)
            case m.Kill(worker_id):
                self.clock.after(self.rng.uniform(0.002, 0.05), lambda: self.kill(worker_id, "killed"))
            case m.Start(count):
                for _ in range(count):
                    self._start_worker()
            case m.CommitCheckpoint() | m.LookAt():
                assert self.store is not None
                self.store.carry_out(command)
            case m.SetTimer(at):
                self.timer += 1
                timer = self.timer
                self.clock.after(at - self.clock.now, lambda: self._tick(timer))
            case m.Metrics(vote):
                self.metrics.append(vote)
                self.checks.visible(vote)
            case m.End():
                self.ended = command
            case m.Log(event, fields=fields):
                self.seen[event] += 1
                self.seen["incident of several worlds"] += event == "incident" and fields["attempts"] > 1
            case m.Status():
                pass

    def _tick(self, timer: int) -> None:
        if timer == self.timer:
            self.hear(m.Tick())

    # ------------------------------------------------------------ messages

    def send(self, worker: SimWorker, event: m.Event) -> None:
        """From a worker to whichever controller is there when it arrives."""
        late = self.scenario.late_reports
        if late and isinstance(event, m.Reported) and self.mischief.random() < late:
            self.clock.after(self.mischief.random(), lambda: self.hear(event))
            return
        self._transmit(worker, lambda: self.hear(event))

    def tell_of_part(self, worker: SimWorker, event: m.Event) -> None:
        """A worker's word about its part of a checkpoint: may come twice, or much too late; waits for a controller."""
        assert self.store is not None
        rng, storage, network = self.store.rng, self.store.storage, self.scenario.network
        if self.clock.now < worker.cut_until or rng.random() < max(network.lose, storage.told_never):
            return

        def arrive() -> None:
            if self.controller is None and self.ended is None:
                self.clock.after(0.1, arrive)
            else:
                self.hear(event)

        for _ in range(1 + (rng.random() < storage.told_twice)):
            late = rng.uniform(0.0, 3.0) if rng.random() < storage.told_late else 0.0
            self.clock.after(late + network.delay_s + rng.random() * network.jitter_s, arrive)

    def _to_worker(self, command: Command) -> None:
        worker = self.workers.get(command.worker_id)
        if worker is not None:
            self._transmit(worker, self._arrival(worker, command))

    def _arrival(self, worker: SimWorker, command: Command) -> Callable[[], None]:
        def arrive() -> None:
            if isinstance(command, m.Settle):
                self.moment(worker, "decision")
            if not worker.alive:
                return
            if self.clock.now < worker.hung_until:
                self.clock.after(worker.hung_until - self.clock.now, arrive)
                return
            worker.deliver(command)

        return arrive

    def _transmit(self, worker: SimWorker, arrive: Callable[[], None]) -> None:
        network, rng = self.scenario.network, self.rng
        if rng.random() < network.lose or self.clock.now < worker.cut_until:
            return
        for _ in range(2 if rng.random() < network.duplicate else 1):
            delay = network.delay_s + rng.random() * network.jitter_s
            if rng.random() < network.late:
                delay += rng.random()
            self.clock.after(delay, arrive)

    # ------------------------------------------------------------ workers

    def _start_worker(self) -> None:
        if self.rng.random() < self.scenario.start_fails:
            self.failing += 1
            life = self.life
            self.clock.after(0.1, lambda: self._start_failed(life))
            return
        number = len(self.workers) + 1
        info = WorkerInfo(WorkerId(f"w{number:04d}"), self._place(), 1000 + number)
        worker = SimWorker(self, info)
        self.workers[info.worker_id] = worker
        self.watched.add(info.worker_id)
        delay = self.scenario.start_s * self.rng.uniform(0.8, 1.5)
        if self.scenario.straggle_s and self.mischief.random() < 0.5:
            delay += self.mischief.uniform(0.0, self.scenario.straggle_s)
        self.clock.after(delay, lambda: self._ready(worker))

    def _ready(self, worker: SimWorker) -> None:
        if worker.alive:
            worker.ready = True
            self.hear(m.WorkerReady(worker.info))

    def _start_failed(self, life: int) -> None:
        if life != self.life:
            return
        self.failing -= 1
        self.hear(m.StartFailed(1, "no room"))

    def _place(self) -> NodeId:
        """Where a TP group lacks a member, else the first node with room, else the emptiest."""
        gone = self.controller.roster.gone if self.controller is not None else set()
        used = [w.info.node_id for i, w in self.workers.items() if w.alive and i not in gone]
        nodes = [NodeId(f"n{i}") for i in range(self.scenario.nodes)]
        tensor = self.scenario.policy.wish.tensor or 1
        room = self.scenario.workers_per_node

        def order(node: NodeId) -> tuple[bool, int, NodeId]:
            count = used.count(node)
            return count % tensor == 0, max(0, count - room + 1), node

        return min(nodes, key=order)

    def kill(self, worker_id: WorkerId, cause: str, with_node: bool = False) -> None:
        """The process ends; its death is pushed to the controller after some milliseconds."""
        worker = self.workers[worker_id]
        if worker.alive:
            self.seen[f"{'member' if worker.member.world else 'worker'} dies in {self.mode}"] += 1
            worker.die()
        self._push_death(worker_id, cause, with_node)

    def _push_death(self, worker_id: WorkerId, cause: str, with_node: bool = False) -> None:
        def push() -> None:
            if self.controller is None and self.ended is None:
                self.clock.after(0.1, push)
            elif worker_id in self.watched:
                self.hear(m.WorkerLost(worker_id, cause, with_node))

        self.clock.after(self.rng.uniform(0.003, 0.02), push)

    # ------------------------------------------------------------ faults

    def moment(self, worker: SimWorker, moment: str) -> None:
        """A worker comes to a moment; an armed fault may strike it, at once or soon."""
        for armed in self.armed:
            if armed.fault.moment == moment and armed.fault.kind != "controller" and armed.count > 0:
                armed.count -= 1
                if armed.count == 0 and moment in SAVING_MOMENTS:
                    self.seen[f"{armed.fault.kind} at {moment}"] += 1
                if armed.count == 0 and armed.fault.at_once:
                    self.strike(worker, armed.fault)
                elif armed.count == 0:
                    self.clock.after(self.rng.uniform(0.0, 0.02), self._strike(worker, armed.fault))

    def moment_of_anybody(self, moment: str) -> None:
        assert self.store is not None
        alive = [w for w in self.workers.values() if w.alive]
        if alive:
            self.moment(self.store.rng.choice(alive), moment)

    def _strike(self, worker: SimWorker, fault: Fault) -> Callable[[], None]:
        return lambda: self.strike(worker, fault)

    def _strike_somebody(self, fault: Fault) -> Callable[[], None]:
        def strike() -> None:
            if fault.kind == "controller":
                if self.controller is not None and self.ended is None:
                    self.crash_controller()
                return
            if fault.kind == "stop":
                self._ask_to_stop()
                return
            alive = [w for w in self.workers.values() if w.alive]
            if alive:
                self.strike(self.rng.choice(alive), fault)

        return strike

    def _ask_to_stop(self) -> None:
        if self.ended is None and self.stop_asked_at is None:
            self.seen[f"stop asked in {self.mode}"] += 1
            self.stop_asked_at = len(self.metrics.votes)
            self.hear(m.StopRequested("asked"))

    def strike(self, worker: SimWorker, fault: Fault) -> None:
        if not worker.alive or self.ended is not None:
            return
        self.seen[f"{fault.kind} strikes"] += 1
        worker.struck.add(fault.kind)
        until = self.clock.now + fault.seconds
        match fault.kind:
            case "crash":
                self.kill(worker.info.worker_id, "crash")
            case "node" | "stage":
                for other in [w for w in self.workers.values() if w.alive and w.shares(fault.kind, worker)]:
                    self.kill(other.info.worker_id, f"{fault.kind} lost", with_node=fault.kind == "node")
            case "all":
                self._everybody_dies()
            case "hang":
                worker.hung_until = until
            case "cut":
                worker.cut_until = until
            case "slow":
                worker.slow = self.rng.choice((2.0, 10.0))
                self.clock.after(fault.seconds, lambda: setattr(worker, "slow", 1.0))
            case "suspect":
                self._push_death(worker.info.worker_id, "suspected")
                self.clock.after(fault.seconds, lambda: self.kill(worker.info.worker_id, "ended at last"))
            case "exception":
                worker.raises = True
            case "flip":
                self.checks.corruption.strike(worker)
            case _:
                raise AssertionError(fault.kind)

    def _everybody_dies(self) -> None:
        """Mostly with the controller: who comes next has submitted the run again, and hears of no death."""
        assert self.store is not None
        alone = self.controller is not None and self.store.rng.random() < 0.5
        self.seen["everybody dies but the controller" if alone else "everybody dies"] += 1
        for worker_id, worker in self.workers.items():
            if not worker.alive:
                continue
            if alone:
                self.kill(worker_id, "all lost")
            else:
                worker.die()
        if not alone and self.controller is not None:
            self.crash_controller()
