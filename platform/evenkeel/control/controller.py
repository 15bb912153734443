"""The controller: one state machine that forms worlds, settles what broke, and forms the next. Events in, commands out.

`step(now, event)` never waits, never reads a clock, and does no I/O; everything that takes time comes back as an event.
Gathering -> Forming -> Running -> Aborting -> Settling -> Gathering, and Ended; see modes.py for what each carries.
"""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import assert_never

from evenkeel.control import messages as m
from evenkeel.control.incident import Incident
from evenkeel.control.liveness import Liveness, blame
from evenkeel.control.modes import Aborting, Ended, Forming, Gathering, Mode, Running, Settling, members_of, world_of
from evenkeel.control.policy import Policy
from evenkeel.control.roster import Roster
from evenkeel.control.settle import decide
from evenkeel.control.trouble import Trouble
from evenkeel.core.ids import INITIAL, Generation, Version, WorkerId
from evenkeel.core.layout import Layout, WorkerInfo
from evenkeel.core.vote import Flags, Vote
from evenkeel.core.world import Source, World
from evenkeel.plan.coverage import lost_slices
from evenkeel.plan.layout import Infeasible, Planned, plan_layout

ASKS_PER_EPOCH = 1_000_000
"""So that an answer to the controller's life before is never taken for one to this life's question."""


class Controller:
    """One life of the controller of one run.

    Args:
        policy: the fixed facts.
        epoch: of this life; higher than that of every life before.
        entries: the journal so far, replayed without any command (rule 15): what is unfinished is repaired by abort
            and settle, once Started comes.
        witness: the last vote in metrics.jsonl (rule 4).
    """

    def __init__(
        self, policy: Policy, epoch: int = 1, entries: Sequence[m.Entry] = (), witness: Vote | None = None
    ) -> None:
        self.policy = policy
        self.epoch = epoch
        self.mode: Mode = Gathering(0.0)
        self.roster = Roster(policy.wish.max_workers + policy.spares)
        self.liveness = Liveness()
        self.trouble = Trouble(policy.max_bad_steps)
        self.generation: Generation = 0
        self.layout: Layout | None = None
        self.committed: Version = INITIAL
        self.visible = 0
        self.witness: Vote | None = None
        self.decision: m.Decision | None = None
        self.evidence: dict[str, m.Answer] = {}
        self.holdings: dict[WorkerId, tuple[m.Held, ...]] = {}
        self.pending = Flags.NONE
        self.stop_reason = ""
        self.incident: Incident | None = None
        self.blamed: set[WorkerId] = set()
        self.asks = epoch * ASKS_PER_EPOCH
        self._journal: list[m.Entry] = []
        self._commands: list[m.Command] = []
        self._replay(entries, witness)

    def step(self, now: float, event: m.Event) -> m.Output:
        """What one event, heard at `now` (seconds, never going back), leads to. An ended controller answers nothing."""
        if isinstance(self.mode, Ended):
            return m.Output()
        self._handle(now, event)
        self._advance(now)
        if not isinstance(self.mode, Ended):
            self._fill(now)
            self._set_timer(now)
        output = m.Output(tuple(self._journal), tuple(self._commands))
        self._journal, self._commands = [], []
        return output

    def _handle(self, now: float, event: m.Event) -> None:
        match event:
            case m.Started(alive):
                self._started(now, alive)
            case m.WorkerReady(worker):
                self._ready(now, worker)
            case m.WorkerLost(worker_id, cause):
                self._lost(now, worker_id, cause)
            case m.StartFailed(count, error):
                self._start_failed(now, count, error)
            case m.Reported(_, reports):
                self._reported(now, reports)
            case m.Failed(worker_id, generation, fault):
                self._failed(now, worker_id, generation, fault)
            case m.Answered():
                self._answered(event)
            case m.Settled():
                self._settled(event)
            case m.Joined():
                self._joined(event)
            case m.Located():
                self._located(now, event)
            case m.Finished(_, generation, reports, eval_loss):
                self._reported(now, reports)
                self._finished(generation, eval_loss)
            case m.StopRequested(reason):
                self._stop(reason)
            case m.Tick():
                self._tick(now)
            case _:
                assert_never(event)

    def _advance(self, now: float) -> None:
        """Follows every transition whose condition holds now."""
        before = None
        while before is not self.mode:
            before = self.mode
            match self.mode:
                case Gathering():
                    self._try_form(now)
                case Forming(world, joined):
                    if joined >= members_of(self.mode):
                        self._run(now, world)
                case Aborting(world, answers=answers):
                    if set(self._survivors(world)) <= answers.keys():
                        self._decide(now, self.mode)
                case Settling(world, done=done):
                    if set(self._survivors(world)) <= done.keys():
                        self._conclude(now, done)
                case Running() | Ended():
                    pass
                case _:
                    assert_never(self.mode)

    # ------------------------------------------------------------ workers come and go

    def _started(self, now: float, alive: tuple[WorkerInfo, ...]) -> None:
        self._journal.append(m.EpochBegun(self.epoch))
        for worker in alive:
            self.roster.add(worker)
        self._show_settled(now)
        match self.mode:
            case Gathering():
                self.mode = Gathering(now)
                self._commands.append(m.Status("starting"))
            case Running(world):
                self.liveness.begin(now)
                if len(self._survivors(world)) < world.size:
                    self._break(now, "worker lost")
                else:
                    self._probe(now)
            case Aborting(world):
                self._abort(now, world, ran=False)
            case Forming() | Settling() | Ended():
                raise AssertionError(f"a replayed controller cannot be {self.mode}")
            case _:
                assert_never(self.mode)

    def _show_settled(self, now: float) -> None:
        """Steps that a decision committed, but that the life before did not come to make visible."""
        votes = [r.vote for answer in self.evidence.values() for r in answer.unreported]
        if self.decision is not None and self.decision.vote is not None:
            votes.append(self.decision.vote)
        for vote in sorted(votes, key=lambda v: v.step):
            if vote.step == self.visible + 1:
                self._make_visible(vote, now)

    def _ready(self, now: float, worker: WorkerInfo) -> None:
        if not self.roster.add(worker):
            return
        self._log(
            "worker_started",
            worker_id=worker.worker_id,
            node_id=worker.node_id,
            pid=worker.pid,
            device=worker.device,
            visible_devices=worker.visible_devices,
        )
        if isinstance(self.mode, Gathering):
            self.mode = replace(self.mode, since=now)
        elif isinstance(self.mode, Running) and not self.pending and self._could_grow(self.mode.world):
            self._ask_flags(Flags.PAUSE)

    def _lost(self, now: float, worker_id: WorkerId, cause: str) -> None:
        """A death, or the confirmation of one."""
        self.roster.dying.discard(worker_id)
        if worker_id in self.roster.gone:
            return
        if worker_id in self.roster.alive:
            self._declare_lost(now, worker_id, cause)
        else:
            self.roster.remove(worker_id)
            self._start_failed(now, 1, f"{worker_id} died while starting: {cause}")

    def _declare_lost(self, now: float, worker_id: WorkerId, cause: str, detect_s: float = 0.0) -> None:
        self.roster.remove(worker_id)
        self.holdings.pop(worker_id, None)
        self._log("worker_lost", worker_id=worker_id, cause=cause)
        if worker_id in members_of(self.mode):
            self._break(now, "worker lost", detect_s).lost.append(worker_id)

    def _kill(self, now: float, worker_id: WorkerId, cause: str, detect_s: float = 0.0) -> None:
        self.roster.dying.add(worker_id)
        self._commands.append(m.Kill(worker_id, cause))
        self._declare_lost(now, worker_id, cause, detect_s)

    def _start_failed(self, now: float, count: int, error: str) -> None:
        self.roster.start_failed(now, count)
        self._log("start_failed", count=count, error=error)
        if self.roster.hopeless:
            self._end("failed", f"workers cannot be started: {error}")

    def _fill(self, now: float) -> None:
        missing = self.roster.to_start(now)
        if missing:
            self._commands.append(m.Start(missing))

    # ------------------------------------------------------------ progress

    def _reported(self, now: float, reports: Iterable[m.Report]) -> None:
        for report in reports:
            if not self._accepts(report.vote):
                continue
            if report.vote.step > self.visible + 1:
                self._break(now, "a report is missing")
                return
            self._show(now, report)

    def _accepts(self, vote: Vote) -> bool:
        """A report counts while its generation is open, which is until the decision (rule 5)."""
        world = world_of(self.mode)
        return (
            world is not None
            and vote.generation == world.generation
            and vote.step > self.visible
            and not self._decided(world)
        )

    def _show(self, now: float, report: m.Report) -> None:
        """A step is committed and becomes visible: its line is durable before anything else follows from it (rule 4)."""
        if isinstance(self.mode, Forming):
            self._run(now, self.mode.world)
        vote = report.vote
        self._make_visible(vote, report.committed_at)
        self.committed = Version(vote.step, vote.generation)
        self.liveness.committed(now)
        self.blamed.clear()
        if isinstance(self.mode, Running):
            if self.incident is not None:
                self._log("incident", **self.incident.fields(now))
                self.incident = None
            self._after_step(now, self.mode.world, vote)

    def _make_visible(self, vote: Vote, committed_at: float) -> None:
        self.visible = vote.step
        self.witness = vote
        self.trouble.committed(vote)
        world = world_of(self.mode)
        assert world is not None
        self._commands.append(m.Metrics(vote, committed_at, world.size))
        if vote.eval_loss is not None:
            self._log("validation", version=vote.step - 1, loss=vote.eval_loss)

    def _after_step(self, now: float, world: World, vote: Vote) -> None:
        verdict = self.trouble.verdict(vote.step + 1)
        if verdict is not None:
            self._end("failed", verdict)
        elif vote.flags & (Flags.PAUSE | Flags.STOP):
            self.pending &= ~Flags.PAUSE
            self._break(now, "stop" if vote.flags & Flags.STOP else "pause")
        elif self.pending and vote.step < self.policy.last_step:
            self._send_flags(world)

    def _joined(self, event: m.Joined) -> None:
        if not isinstance(self.mode, Forming) or event.generation != self.mode.world.generation:
            return
        if event.worker_id in self.roster.alive:
            self.mode = replace(self.mode, joined=self.mode.joined | {event.worker_id})
        if self.incident is not None:
            self.incident.regroup_s = max(self.incident.regroup_s, event.regroup_s)
            self.incident.reshard_s = max(self.incident.reshard_s, event.reshard_s)

    def _finished(self, generation: Generation, eval_loss: float | None) -> None:
        world = world_of(self.mode)
        if not isinstance(self.mode, Forming | Running) or world is None or world.generation != generation:
            return
        if self.committed.step < self.policy.last_step:
            return
        if eval_loss is not None:
            self._log("validation", version=self.committed.step, loss=eval_loss)
        self._end("finished")

    # ------------------------------------------------------------ requests

    def _stop(self, reason: str) -> None:
        self.stop_reason = reason
        self._log("stop_requested", reason=reason)
        self._ask_flags(Flags.STOP)

    def _ask_flags(self, flags: Flags) -> None:
        self.pending |= flags
        if isinstance(self.mode, Running):
            self._send_flags(self.mode.world)

    def _send_flags(self, world: World) -> None:
        self._commands.append(m.Request(world.leader, self.epoch, world.generation, self.pending))

    def _could_grow(self, world: World) -> bool:
        """Whether the workers that are ready would make a larger world, with steps left to use it."""
        if world.size >= self.policy.wish.max_workers or len(self.roster.alive) <= world.size:
            return False
        if self.committed.step + 1 >= self.policy.last_step:
            return False
        planned = self._plan()
        return isinstance(planned, Planned) and len(planned.layout.members) > world.size

    # ------------------------------------------------------------ trouble

    def _failed(self, now: float, worker_id: WorkerId, generation: Generation, fault: m.Fault) -> None:
        world = world_of(self.mode)
        if world is None or world.generation != generation or worker_id not in self.roster.alive:
            return
        if self._decided(world):
            return
        incident = self._break(now, "broken collective" if fault.collective else "exception")
        if not fault.collective:
            text = _describe(worker_id, fault)
            self.trouble.exception(fault.step, generation, text)
            self._log("exception", worker_id=worker_id, text=text)
            incident.cause = "exception"
            incident.faults.append(text)

    def _tick(self, now: float) -> None:
        match self.mode:
            case Forming() | Running():
                self._watch(now)
            case Aborting(world, since=since, answers=answers):
                self._kill_silent(now, since, set(self._survivors(world)) - answers.keys(), "did not park")
            case Settling(world, since=since, done=done):
                self._kill_silent(now, since, set(self._survivors(world)) - done.keys(), "did not settle")
            case Gathering() | Ended():
                pass
            case _:
                assert_never(self.mode)

    def _kill_silent(self, now: float, since: float, silent: set[WorkerId], what: str) -> None:
        limit = self.liveness.park_s
        if now < since + limit:
            return
        if silent:
            self.liveness.strike()
            for worker in sorted(silent):
                self._kill(now, worker, f"{what} within {limit:.1f} s", limit)
                if self.incident is not None:
                    self.incident.unparked.add(worker)

    def _watch(self, now: float) -> None:
        """Missing progress: ask everybody, kill who does not answer, then who others wait for (design, section 5)."""
        silent = self.liveness.unanswered(now)
        quiet_s = now - self.liveness.progress_at
        again = self.liveness.ask_again(now)
        if again:
            self._commands.extend(m.Probe(w, self.epoch, self.liveness.probe) for w in again)
        elif silent:
            self.liveness.strike()
            for worker in silent:
                self._kill(now, worker, "no answer to a probe", quiet_s)
        elif self.liveness.stuck(now):
            self.liveness.strike()
            self._evict_or_rebuild(now, quiet_s)
        elif self.liveness.due(now):
            self._probe(now)

    def _located(self, now: float, event: m.Located) -> None:
        self.liveness.located(now, event.worker_id, event.probe, event.position)
        world = world_of(self.mode)
        if isinstance(self.mode, Forming) and world is not None and event.position.generation < world.generation:
            # It answers, but has not heard of the world: the command was lost on the way.
            if event.worker_id in members_of(self.mode):
                self._commands.append(m.Form(event.worker_id, self.epoch, world))

    def _evict_or_rebuild(self, now: float, quiet_s: float) -> None:
        positions = self.liveness.before
        culprit = blame(positions)
        if culprit is None:
            least = min(sorted(positions), key=lambda w: positions[w])
            if least in self.blamed:
                culprit = least
            self.blamed.add(least)
        if culprit is None:
            self._break(now, "no progress, nobody behind the others", quiet_s)
        else:
            self._kill(now, culprit, "no progress, others wait for it", quiet_s)

    def _probe(self, now: float) -> None:
        members = sorted(members_of(self.mode) & self.roster.alive.keys())
        probe = self.liveness.ask(now, members)
        self._commands.extend(m.Probe(w, self.epoch, probe) for w in members)

    # ------------------------------------------------------------ from a broken world to the next

    def _break(self, now: float, cause: str, detect_s: float = 0.0) -> Incident:
        """Stops the world that is there: every survivor is to promise that it commits nothing more of it.

        A loss while a decision is being carried out asks everybody again; the decision stands (rule 6).
        """
        world = world_of(self.mode)
        assert world is not None
        if self.incident is None:
            self.incident = Incident(cause, now, detect_s)
        elif self.incident.planned:
            self.incident.cause = cause
        if isinstance(self.mode, Forming | Running | Settling):
            self._abort(now, world, ran=isinstance(self.mode, Running))
        return self.incident

    def _abort(self, now: float, world: World, ran: bool) -> None:
        self.asks += 1
        self.mode = Aborting(world, self.asks, now, ran)
        self._commands.extend(
            m.Abort(w, self.epoch, world.generation, self.asks, self.visible) for w in self._survivors(world)
        )

    def _decided(self, world: World) -> bool:
        return self.decision is not None and self.decision.generation == world.generation

    def _decide(self, now: float, mode: Aborting) -> None:
        world = mode.world
        if self.incident is not None:
            self.incident.answered_at = now
        if not self._decided(world):
            self._settle_open_step(now, mode)
        verdict = self.trouble.verdict(self.committed.step + 1)
        if verdict is not None:
            self._end("failed", verdict)
            return
        assert self.decision is not None
        self.mode = Settling(world, mode.ask, now, self.decision)
        self._commands.extend(m.Settle(w, self.epoch, mode.ask, self.decision) for w in self._survivors(world))

    def _settle_open_step(self, now: float, mode: Aborting) -> None:
        world = mode.world
        answers = {w: a for w, a in sorted(mode.answers.items()) if w in self.roster.alive}
        for answer in answers.values():
            for report in answer.unreported:
                if self._accepts(report.vote) and report.vote.step == self.visible + 1:
                    self._show(now, report)
        self.decision = decide(world, answers, self.witness)
        lost = tuple(i.worker_id for i in world.members if i.worker_id not in self.roster.alive)
        evidence = {str(w): a for w, a in answers.items()}
        self._journal.append(m.StepSettled(self.decision, evidence, self.witness, lost))
        self.committed = self.decision.base
        vote = self.decision.vote
        if vote is not None and vote.step > self.visible:
            self._make_visible(vote, now)
            self._log("step_rolled_forward", reason=self.decision.reason)
            if self.incident is not None:
                self.incident.rolled_forward = True
        elif any(
            a.position.generation == world.generation and a.position.step > self.committed.step
            for a in answers.values()
        ):
            self._log("step_rolled_back", reason=self.decision.reason)
        if self.incident is not None and not self.incident.planned:
            crashed = mode.ran and bool(set(lost) - self.incident.unparked)
            self.trouble.broken(self.committed.step + 1, crashed, self.incident.describe())

    def _conclude(self, now: float, done: dict[WorkerId, tuple[m.Held, ...]]) -> None:
        if self.incident is not None:
            self.incident.settled_at = now
        self.holdings = {w: held for w, held in done.items() if w in self.roster.alive}
        self.mode = Gathering(now)

    def _try_form(self, now: float) -> None:
        sources = self._sources()
        lost = self._lost_slices(sources)
        if self.pending & Flags.STOP:
            self._end("stopped", self.stop_reason)
        elif lost:
            self._end("failed", f"step {self.committed.step} is lost: nobody alive holds {_names(lost)}")
        elif not self._wait_for_more(now):
            planned = self._plan()
            if isinstance(planned, Infeasible):
                self._wait_for(planned.reason)
                return
            members = set(planned.layout.members)
            usable = tuple(s for s in sources if s.worker_id in members)
            if self._lost_slices(usable):
                self._wait_for(
                    "workers: the layout for those that are here has no place for the only holders of some state"
                )
                return
            self._form(now, planned, usable)

    def _wait_for(self, what: str) -> None:
        assert isinstance(self.mode, Gathering)
        if what != self.mode.waiting_for:
            self.mode = replace(self.mode, waiting_for=what)
            self._commands.append(m.Status("paused" if self.generation else "starting", what))
            self._log("waiting", reason=what)

    def _wait_for_more(self, now: float) -> bool:
        """At the start of a run, whether more of the workers asked for may still come soon."""
        assert isinstance(self.mode, Gathering)
        missing = self.policy.wish.max_workers - len(self.roster.alive)
        return self.generation == 0 and missing > 0 and now < self.mode.since + self.policy.gather_s

    def _plan(self) -> Planned | Infeasible:
        policy = self.policy
        return plan_layout(self._candidates(), policy.wish, policy.model, policy.micro_batches, self.layout)

    def _form(self, now: float, planned: Planned, sources: tuple[Source, ...]) -> None:
        layout = planned.layout
        self.generation += 1
        infos = tuple(self.roster.alive[w] for w in layout.members)
        world = World(
            generation=self.generation,
            layout=layout,
            base=self.committed,
            members=infos,
            sources=sources,
            nodes=tuple((i.worker_id, i.node_id) for i in infos),
            last_step=self.policy.last_step,
            cause=self.incident.cause if self.incident is not None else "start",
            reason=planned.reason,
        )
        spares = tuple(i for w, i in sorted(self.roster.alive.items()) if w not in layout.places)
        self._journal.append(m.WorldOpened(world, spares))
        self.layout = layout
        self.witness = None
        self.pending &= ~Flags.PAUSE
        self.mode = Forming(world)
        self.liveness.begin(now)
        if self.incident is not None:
            self.incident.attempts += 1
        self._commands.extend(m.Form(w, self.epoch, world) for w in layout.members)

    def _run(self, now: float, world: World) -> None:
        self.mode = Running(world)
        self.liveness.begin(now)
        if self.incident is not None:
            self.incident.joined_at = now
        self._log("world_formed", world_size=world.size, cause=world.cause, reason=world.reason)
        self._commands.append(m.Status("running"))
        if self._could_grow(world):
            self.pending |= Flags.PAUSE
        if self.pending:
            self._send_flags(world)

    def _end(self, status: str, error: str = "") -> None:
        if self.incident is not None and not self.incident.planned:
            self._log("incident_unfinished", cause=self.incident.cause, lost=list(self.incident.lost))
        self.mode = Ended(status, error)
        self._journal.append(m.RunEnded(status, error))
        self._commands.append(m.End(status, error))

    # ------------------------------------------------------------ small parts

    def _replay(self, entries: Sequence[m.Entry], witness: Vote | None) -> None:
        world: World | None = None
        for entry in entries:
            match entry:
                case m.EpochBegun():
                    pass
                case m.WorldOpened(opened):
                    world, self.layout, self.generation = opened, opened.layout, opened.generation
                    self.committed = opened.base
                case m.StepSettled(decision, evidence, lost=lost):
                    self.decision, self.committed, self.evidence = decision, decision.base, evidence
                    self.roster.gone.update(lost)
                case m.RunEnded(status, error):
                    self.mode = Ended(status, error)
                    return
                case _:
                    assert_never(entry)
        self.visible = witness.step if witness is not None else 0
        if world is None:
            return
        self.mode = Aborting(world, 0, 0.0, ran=False)
        if witness is not None and witness.generation == world.generation and not self._decided(world):
            self.witness = witness
            self.committed = Version(witness.step, witness.generation)
            self.mode = Running(world)

    def _sources(self) -> tuple[Source, ...]:
        """Who holds the committed version, by lineage: step and generation must both agree (rule 7)."""
        return tuple(
            Source(w, held.shard)
            for w, holdings in sorted(self.holdings.items())
            for held in holdings
            if held.version == self.committed
        )

    def _lost_slices(self, sources: Iterable[Source]) -> tuple[str, ...]:
        """What of the committed version none of these holds; of the initial one nothing, since everybody can make it."""
        return () if self.committed == INITIAL else lost_slices(self.policy.model, (s.shard for s in sources))

    def _candidates(self) -> list[WorkerInfo]:
        """Alive workers in order of preference: those of the last layout in their ranks, other holders, the rest."""
        ranked = self.layout.members if self.layout is not None else ()
        order = dict.fromkeys((*ranked, *sorted(self.holdings), *sorted(self.roster.alive)))
        return [self.roster.alive[w] for w in order if w in self.roster.alive]

    def _survivors(self, world: World) -> tuple[WorkerId, ...]:
        return tuple(i.worker_id for i in world.members if i.worker_id in self.roster.alive)

    def _answered(self, event: m.Answered) -> None:
        match self.mode:
            case Aborting(world, ask, answers=answers) if (ask, world.generation) == (event.ask, event.generation):
                answers[event.worker_id] = event.answer
            case _:
                pass

    def _settled(self, event: m.Settled) -> None:
        match self.mode:
            case Settling(world, ask, done=done) if (ask, world.generation) == (event.ask, event.generation):
                done[event.worker_id] = event.held
            case _:
                pass

    def _set_timer(self, now: float) -> None:
        times = [] if self.roster.retry_at is None else [self.roster.retry_at]
        match self.mode:
            case Forming() | Running():
                times.append(self.liveness.next_check())
            case Aborting(since=since) | Settling(since=since):
                times.append(since + self.liveness.park_s)
            case Gathering(since=since):
                if self.generation == 0 and now < since + self.policy.gather_s:
                    times.append(since + self.policy.gather_s)
            case Ended():
                pass
            case _:
                assert_never(self.mode)
        if times:
            self._commands.append(m.SetTimer(min(times)))

    def _log(self, event: str, **fields: object) -> None:
        self._commands.append(m.Log(event, self.generation, self.committed.step, fields))


def _describe(worker_id: WorkerId, fault: m.Fault) -> str:
    where = f"worker {worker_id}, step {fault.step}, {fault.phase}"
    if fault.layer:
        where += f", layer {fault.layer}, micro-batch {fault.micro}"
    return f"{where}: {fault.error}"


def _names(lost: Sequence[str]) -> str:
    shown = ", ".join(lost[:8])
    return shown if len(lost) <= 8 else f"{shown} and {len(lost) - 8} more"
