"""One run in virtual time: the real controller, and workers of which only what it hears of is simulated."""

from collections.abc import Callable, Sequence
from math import inf
from typing import assert_never

from evenkeel.control import messages as m
from evenkeel.control.controller import Controller
from evenkeel.control.modes import Ended, Gathering, Running
from evenkeel.core.ids import INITIAL, Version, WorkerId
from evenkeel.core.vote import Flags
from evenkeel.core.world import World
from evenkeel.sim.clock import Clock
from evenkeel.sim.goodput.collecting import seldom_collected
from evenkeel.sim.goodput.fleet import Fleet
from evenkeel.sim.goodput.holdings import Holdings
from evenkeel.sim.goodput.ledger import Ledger
from evenkeel.sim.goodput.members import Members
from evenkeel.sim.goodput.pace import Pace
from evenkeel.sim.goodput.record import Record
from evenkeel.sim.goodput.saving import Saving
from evenkeel.sim.goodput.setting import Change, Outcome, Setting
from evenkeel.sim.goodput.training import Training

TO_MANY = (m.Abort, m.Settle, m.Form, m.Probe)
PARTS = 200
"""Of a run, after each of which its progress is told."""


class Run:
    """See the module. Messages take no time but what Costs says, and none is lost.

    Attributes:
        step: the last one that is committed.
        ended: why the run is over; "" while it is not.
    """

    def __init__(self, setting: Setting) -> None:
        self.setting = setting
        self.clock = Clock()
        self.fleet = Fleet(self.clock, setting.slots, setting.costs, self.hear, setting.kinds)
        self.holdings = Holdings(setting.model, setting.folded)
        self.saving = Saving(self.clock, self.fleet, setting.costs, self.holdings.state_bytes, self.hear)
        self.ledger = Ledger(setting.step_s)
        self.record = Record()
        self._members = Members(self.clock, self.fleet, self.holdings, setting.costs, self.hear)
        self.step = 0
        self.ended = ""
        self._pace = Pace(setting)
        self._cause = "other"
        self._begun = False
        self._joining: World | None = None
        self._training: Training | None = None
        self._vote_at = 0
        self._step_s = 0.0
        self._fresh = 0
        self._wakes_at = self._timer_at = inf
        self.controller = Controller(setting.policy)
        for name in setting.nodes:
            self.fleet.come(name)
        self._changes = setting.failures.changes(setting.nodes, setting.seed, setting.duration_s)
        self._expect_change()
        self.hear([m.Started()])

    # ------------------------------------------------------------ for who drives it

    @property
    def now(self) -> float:
        """Virtual seconds since the run was started."""
        return self.clock.now

    def until(self, at: float) -> None:
        """Goes on up to this second."""
        while self._advance(at):
            pass
        self.clock.now = max(at, self.clock.now)
        self._report()

    def until_step(self, step: int, at_most: float) -> bool:
        """Goes on until this step is committed; False if it is not by the second `at_most`, or the run ends before."""
        while self.step < step and self.now < at_most and not self.ended:
            training = self._training
            if training is not None and not training.halted:
                at = min(training.commits_at(min(step, self._vote_at)), at_most)
                if not self._advance(at):  # else the step may come at another time now, in another world
                    self.until(at)
            elif not self._advance(at_most):
                break
        return self.step >= step

    def lose(self, rank: int) -> None:
        """The process of this rank dies. Raises ValueError where there is no world, or nobody alive has that rank."""
        world = self._world
        if world is None or not self._dies(lambda: self.fleet.kill(world.layout.members[rank], "killed")):
            raise ValueError(f"nobody has rank {rank} at {self.now:.3f} s")

    def outcome(self) -> Outcome:
        """What has come of it up to now. The run is not to be driven any further."""
        self._account()
        self.ledger.spend(self.now, "other")  # the open step
        self.fleet.count(self.now)
        setting, record = self.setting, self.record
        device_seconds = self.fleet.node_seconds * setting.devices_per_node
        return Outcome(
            duration_s=self.now,
            seconds=dict(self.ledger.seconds),
            steps=self.step,
            tokens=self.step * setting.tokens_per_step,
            device_seconds=device_seconds,
            cost=device_seconds / 3600 * setting.price_per_device_hour,
            incidents=record.incidents,
            restores=dict(record.restores),
            events=record.events,
            messages=record.messages,
            decisions=tuple(record.decisions),
            ended=self.ended,
        )

    # ------------------------------------------------------------ time

    def _advance(self, at_most: float) -> bool:
        """Whatever comes next; False if nothing does by then."""
        timer = self._next_tick()
        if self.ended or min(self.clock.next_at, timer) > at_most:
            return False
        if timer < self.clock.next_at:
            self.clock.now = max(self.clock.now, timer)
            self._timer_at = inf
            self.hear([m.Tick()])
        else:
            self.clock.advance()
        return True

    def _next_tick(self) -> float:
        """While steps are committed the controller's timer is put off by each of them, also by those not told yet."""
        if self._training is None or self._training.halted:
            return self._timer_at
        retry_at = self.controller.roster.retry_at
        return inf if retry_at is None else retry_at

    def _expect_change(self) -> None:
        change = next(self._changes, None)
        if change is not None:
            self.clock.at(change.at_s, lambda: self._change(change))

    def _change(self, change: Change) -> None:
        if change.there:
            self.fleet.come(change.node)
        else:
            self._dies(lambda: self.fleet.go(change.node))
        self._expect_change()

    def _dies(self, kill: Callable[[], Sequence[WorkerId]]) -> Sequence[WorkerId]:
        """Members that die halt the training at once; the controller hears of it later. Returns who died."""
        self._report()
        dead = kill()
        self.holdings.forget(dead)
        training = self._training
        if training is not None and any(worker in training.world.layout.places for worker in dead):
            self._halt(training)
        return dead

    # ------------------------------------------------------------ the controller's shell

    def hear(self, events: Sequence[m.Event]) -> None:
        """The controller hears what happens at once."""
        if self.ended or not events:
            return
        self._account()
        if self._training is not None and isinstance(events[0], m.WorkerReady):
            self._training.told = 0  # a spare may be worth more than a member
        self._pass_on(self.now, events)
        self._look_ahead()

    def _pass_on(self, now: float, events: Sequence[m.Event]) -> None:
        self.record.heard(events)
        for output in self.controller.several(now, events):
            for entry in output.journal:
                self.record.entry(now, entry)
                if isinstance(entry, m.Restored):
                    self.ledger.take_back(entry.base.step)
                    self.step = entry.base.step
            to_many: dict[type[m.Command], list[m.Command]] = {}
            for command in output.commands:
                if type(command) in TO_MANY:
                    to_many.setdefault(type(command), []).append(command)
                else:
                    self._carry_out(command)
            for commands in to_many.values():
                self.record.messages += len(commands)
                self._tell(commands)
        self._cause = self._cause_now()

    def _tell(self, commands: Sequence[m.Command]) -> None:
        """What every worker concerned is told: the first stands for all."""
        match commands[0]:
            case m.Abort() as abort:
                self._stop()
                self._members.promise(abort, self.saving.copying_until)
            case m.Settle() as settle:
                self._members.settle(settle)
            case m.Form(world=world):
                self._form(world)
            case m.Probe(probe=probe):
                self._members.locate([c.worker_id for c in commands if isinstance(c, m.Probe)], probe)
            case _:
                raise AssertionError(f"not for all workers: {commands[0]}")

    def _carry_out(self, command: m.Command) -> None:
        match command:
            case m.Metrics() | m.Status():
                pass
            case m.Request(_, _, generation, flags):
                self.record.messages += 1
                if self._training is not None and generation == self._training.world.generation:
                    self._training.ask(flags)
            case m.Kill(worker, reason):
                self.clock.after(0.0, lambda: self._dies(lambda: self.fleet.kill(worker, reason)))
            case m.Start(count):
                self.fleet.start(count)
            case m.CommitCheckpoint():
                self.saving.commit(command)
            case m.LookAt(version, file):
                self.clock.after(0.0, lambda: self.hear([m.Looked(version, file)]))
            case m.SetTimer(at):
                self._timer_at = at
            case m.End(status, error):
                self._end(f"{status}: {error}" if error else status)
            case m.Log():
                self.record.log(command)
            case m.Abort() | m.Settle() | m.Form() | m.Probe():
                raise AssertionError(f"for all workers: {command}")
            case _:
                assert_never(command)

    @property
    def _world(self) -> World | None:
        if self._training is not None:
            return self._training.world
        return self._joining

    def _cause_now(self) -> str:
        """What the time from now on goes into, until something else happens."""
        match self.controller.mode:
            case Ended():
                return "other"
            case Running() if self._training is not None and self._training.halted:
                return "detect"
            case Gathering(waiting_for=what) if self._begun and not what.startswith("a "):
                return "starved"  # else it waits for a checkpoint, not for workers
            case _:
                return "rebuild" if self._begun else "other"

    def _account(self) -> None:
        """Tells the ledger what the time up to now went into; of steps only those that are committed."""
        self._report()
        if self._training is None or self._training.halted:
            self.ledger.spend(self.now, self._cause)

    def _end(self, why: str) -> None:
        if self._training is not None:
            self._halt(self._training)
        self._training = self._joining = None
        self.ended = why

    # ------------------------------------------------------------ stopping

    def _stop(self) -> None:
        """Every member parks."""
        training, self._training, self._joining = self._training, None, None
        if training is not None:
            world = training.world
            self._halt(training)
            self.holdings.halt(self.now)
            self._fresh = training.fresh
            if training.step > world.base.step:
                self.holdings.stop(Version(training.step, world.generation))
        self._members.park()

    def _halt(self, training: Training) -> None:
        """No step is committed from here on; the open one is lost."""
        if not training.halted:
            self._hold(training, self.now)
            self.ledger.spend(self.now, "redo")
            self.holdings.halt(self.now)
            self._cause = "detect"
            self._members.wait(training.step + 1)
            training.halted = True

    def _hold(self, training: Training, now: float) -> None:
        """Accounts for what held up the open step."""
        for cause, until in training.held_by:
            self.ledger.spend(max(self.ledger.at, min(until, now)), cause)

    # ------------------------------------------------------------ joining

    def _form(self, world: World) -> None:
        if self._joining is world:
            return  # told again
        costs = self.setting.costs
        missing = self.holdings.missing(world)
        moves = costs.restore(missing) if world.saved else costs.reshard(missing)
        reshard_s = moves if missing else 0.0
        self._joining = world
        self._members.enter(world)
        self.clock.after(costs.plan_s + costs.regroup_s + reshard_s, lambda: self._join(world, reshard_s))

    def _join(self, world: World, reshard_s: float) -> None:
        """Unless somebody has died meanwhile: then the others wait for it until they are told to stop."""
        members = world.layout.members
        if self._joining is not world or any(worker not in self.fleet.alive for worker in members):
            return
        self._account()
        self._joining = None
        self.holdings.join(world)
        held_by = [("rebuild" if self._begun else "other", self.setting.costs.first_step_s)]
        self._begun = True
        if world.mirror_every is not None and world.base != INITIAL:
            held_by.append(("checkpoint", self._mirror(world, world.base)))
        step_s = self._pace.step_s(world)
        training = Training(world, step_s, self.setting.tokens_per_step, world.base.step, self.now)
        if self.setting.checkpoint_every != 0:
            training.fresh = 2
        elif step_s == self._step_s:
            training.fresh = max(2, self._fresh)
        self._training, self._step_s = training, step_s
        training.hold(held_by)
        regroup_s = self.setting.costs.regroup_s
        self.hear([m.Joined(worker, world.generation, regroup_s, reshard_s) for worker in members])

    def _mirror(self, world: World, version: Version) -> float:
        """Begins a mirror; returns for how long it holds the training up."""
        costs = self.setting.costs
        whole_at = self.now + costs.mirror_stall_s + costs.mirror_send_s
        self.holdings.mirror(world, version, whole_at)
        return costs.mirror_stall_s

    # ------------------------------------------------------------ steps

    def _report(self) -> None:
        """The leader tells of the steps that are committed by now, up to each one whose vote matters at its time."""
        training = self._training
        while training is not None and training is self._training and not training.halted:
            last = min(training.committed_by(self.now), self._vote_at)
            if last <= training.step:
                return
            self._commit(training, last)
            self._look_ahead()

    def _commit(self, training: Training, last: int) -> None:
        at, first, world = min(training.commits_at(last), self.now), training.step + 1, training.world
        flags = training.flags(last, self.saving.busy_until, self.holdings.mirroring_until)
        self._hold(training, at)
        self.ledger.commit(at, first, last - training.step, training.step_s)
        reports = tuple(m.Report(vote, at) for vote in training.votes(last, flags))
        self.step = last
        version = Version(last, world.generation)
        held_by: list[tuple[str, float]] = []
        if flags & Flags.CHECKPOINT:
            self.saving.begin(version, world.layout.members)
            held_by.append(("checkpoint", self.setting.costs.save_stall_s))
        if flags & Flags.MIRROR:
            held_by.append(("checkpoint", self._mirror(world, version)))
        if first == world.base.step + 1:
            self.holdings.voted(world)
        training.advance(last, flags)
        training.hold(held_by)
        if training.halted:
            self._members.park(last)
        self._pass_on(at, [m.Reported(world.leader, reports, self._pace.timings(world, last))])

    def _look_ahead(self) -> None:
        """Wakes up at the next step whose vote matters at its time."""
        training = self._training
        if training is None or training.halted:
            return
        busy, mirroring = self.saving.busy_until, self.holdings.mirroring_until
        vote_at = training.next_vote(busy, mirroring, self.controller.saves_after, self.controller.weighs)
        at = training.commits_at(vote_at)
        if (vote_at, at) != (self._vote_at, self._wakes_at):
            self._vote_at, self._wakes_at = vote_at, at
            self.clock.at(at, self._report)


def simulate_one(setting: Setting, progress: Callable[[float], None] = lambda now: None) -> Outcome:
    """One run of the setting, from its seed.

    Args:
        progress: is told from time to time how far it has come, in seconds of the run.

    Raises:
        ValueError: if the failure model has a node come that is there, or go that is not.
    """
    with seldom_collected():
        run = Run(setting)
        for part in range(1, PARTS + 1):
            run.until(setting.duration_s * part / PARTS)
            progress(run.now)
        return run.outcome()
