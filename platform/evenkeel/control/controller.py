"""The controller: one state machine that forms worlds, settles what broke, and forms the next. Events in, commands out.

`step(now, event)` never waits, never reads a clock, and does no I/O; everything that takes time comes back as an event.
Gathering -> Forming -> Running -> Aborting -> Settling -> Gathering, and Ended; see modes.py for what each carries.
"""

from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import assert_never

from evenkeel.control import balancing, beginning, divergence, forming, progress, repair, saving, takings, watch
from evenkeel.control import messages as m
from evenkeel.control.entries import NOTHING_SHOWN, Shown
from evenkeel.control.modes import Aborting, Ended, Forming, Gathering, Mode, Running, Settling
from evenkeel.control.policy import Policy
from evenkeel.control.roster import Roster
from evenkeel.control.state import State
from evenkeel.control.trouble import Trouble
from evenkeel.core.ids import Version, WorkerId
from evenkeel.core.layout import WorkerInfo
from evenkeel.core.vote import Flags
from evenkeel.core.world import World

ASKS_PER_EPOCH = 1_000_000
"""So that an answer to the controller's life before is never taken for one to this life's question."""


class Controller:
    """One life of the controller of one run.

    Args:
        policy: the fixed facts.
        epoch: of this life; higher than that of every life before.
        entries: the journal so far, replayed without any command (rule 15): what is unfinished is repaired by abort
            and settle, once Started comes.
        shown: what metrics.jsonl says.
        again: the run was submitted again: an end in the journal is not the end of it.
    """

    def __init__(
        self,
        policy: Policy,
        epoch: int = 1,
        entries: Sequence[m.Entry] = (),
        shown: Shown = NOTHING_SHOWN,
        again: bool = False,
    ) -> None:
        roster = Roster(policy.wish.max_workers + policy.spares)
        trouble = Trouble(policy.max_bad_steps)
        self._state = State(policy, epoch, roster, trouble, epoch * ASKS_PER_EPOCH, Gathering(0.0))
        _replay(self._state, entries, shown, again)

    @property
    def mode(self) -> Mode:
        return self._state.mode

    @property
    def roster(self) -> Roster:
        return self._state.roster

    @property
    def saves_after(self) -> int | None:
        """The step after which it will ask for a checkpoint, by what it knows now; None if it does not know."""
        return saving.due_at(self._state)

    @property
    def weighs(self) -> bool:
        """Whether what workers measure next may lead to another layout, or tell what the last one has brought."""
        return balancing.weighs(self._state)

    def step(self, now: float, event: m.Event) -> m.Output:
        """What one event, heard at `now` (seconds, never going back), leads to. An ended controller answers nothing."""
        s = self._state
        if isinstance(s.mode, Ended):
            return m.Output()
        _hear(s, now, event)
        _conclude(s, now)
        return s.output()

    def several(self, now: float, events: Sequence[m.Event]) -> tuple[m.Output, ...]:
        """What events lead to that arrive at once. The outputs are to be carried out one after the other, like those of
        `step`: what is to be durable before a later event counts is in an output before that.

        Each event is heard, and settles what it settles, in this order and as in `step`. Only what depends on who is
        here waits until all are heard, and is done once: a new world is formed, workers are asked for, a larger world
        is paused for, and the timer is set. So where none of the events but the last leads to a new world, or to the
        wait for one, the journal and the commands are those of one `step` after another, but for SetTimer (the last one
        counts), Start (the sum; where a start has failed, it may come with the retry), the request for that pause, and
        the end of a run whose last step is among the events (it comes with the next tick). Where an earlier one does,
        they are those of looking for a world at the last event only: nobody joins one that the next event breaks.
        """
        s = self._state
        outputs: list[m.Output] = []
        i, last = 0, len(events) - 1
        while i <= last and not isinstance(s.mode, Ended):
            i += takings.taken_down(s, now, events, i)
            written, said = len(s.journal), len(s.commands)
            _hear(s, now, events[i])
            if i == last:
                _conclude(s, now)
            if said and len(s.journal) > written:
                outputs.append(s.output(written, said))
            i += 1
        outputs.append(s.output())
        return tuple(outputs)


def _hear(s: State, now: float, event: m.Event) -> None:
    """All that an event leads to by itself."""
    _handle(s, now, event)
    saving.end_if_failing(s)
    _advance(s, now)


def _conclude(s: State, now: float) -> None:
    """What depends on who is here, once for all events that arrived at once."""
    before = None
    while isinstance(s.mode, Gathering) and before is not s.mode:
        before = s.mode
        forming.try_form(s, now)
    saving.end_if_failing(s)
    progress.end_if_over(s)
    if isinstance(s.mode, Ended):
        return
    forming.grow(s)
    _fill(s, now)
    at = watch.next_tick(s, now)
    if at is not None:
        s.say(m.SetTimer(at))


def _handle(s: State, now: float, event: m.Event) -> None:
    match event:
        # First those that each of thousands of workers sends.
        case m.Joined():
            progress.joined(s, event)
        case m.Answered():
            repair.answered(s, event)
        case m.Settled():
            repair.settled(s, event)
        case m.PartWritten():
            saving.written(s, now, event)
        case m.Located():
            watch.located(s, now, event)
        case m.Started():
            _started(s, now, event)
        case m.WorkerReady(worker):
            _ready(s, now, worker)
        case m.WorkerLost():
            _lost(s, now, event)
        case m.StartFailed(count, error):
            _start_failed(s, now, count, error)
        case m.Reported(_, reports, timings):
            progress.reported(s, now, reports, timings)
        case m.Failed():
            repair.failed(s, now, event)
        case m.NotFinite(worker_id, step, what):
            s.trouble.not_finite = f"{worker_id} met {what} in step {step}"
            s.log("not_finite", worker_id=worker_id, text=what)
        case m.MemoryUsed():
            s.log("memory", **asdict(event))
        case m.Finished(_, generation, reports, eval_loss):
            progress.reported(s, now, reports)
            progress.finished(s, generation, eval_loss)
        case m.PartFailed():
            saving.failed(s, now, event)
        case m.StillWriting():
            saving.still_writing(s, now, event)
        case m.StorageTrouble(worker_id, error):
            s.log("storage_trouble", worker_id=worker_id, error=error)
        case m.CheckpointCommitted():
            saving.committed(s, now, event)
        case m.CheckpointFailed(version, error):
            saving.refused(s, version, error)
        case m.CheckpointUnreadable():
            repair.unreadable(s, now, event)
        case m.Looked():
            repair.looked(s, now, event)
        case m.StopRequested(reason):
            s.stop_reason = reason
            s.log("stop_requested", reason=reason)
            forming.ask_flags(s, Flags.STOP)
        case m.Tick():
            watch.tick(s, now)
        case _:
            assert_never(event)


def _advance(s: State, now: float) -> None:
    """Follows every transition whose condition holds now, up to the forming of a world."""
    before = None
    while before is not s.mode:
        before = s.mode
        match s.mode:
            case Forming(world, awaited):
                if not awaited:
                    forming.run(s, now, world)
            case Aborting(awaited=awaited):
                if not awaited:
                    repair.settle(s, now, s.mode)
            case Settling(awaited=awaited, done=done):
                if not awaited:
                    repair.conclude(s, now, done)
            case Gathering() | Running() | Ended():
                pass
            case _:
                assert_never(s.mode)


# ---------------------------------------------------------------- the controller's own start


def _replay(s: State, entries: Sequence[m.Entry], shown: Shown, again: bool) -> None:
    """What the journal says, and metrics.jsonl, without any command."""
    witness = shown.witness
    s.saving, s.worker_seconds = shown.saving, shown.worker_seconds
    world: World | None = None
    ended: m.RunEnded | None = None
    for entry in entries:
        match entry:
            case m.EpochBegun():
                ended = None
            case m.WorldOpened(opened, spares):
                s.holdings.update(_carried_out(s))
                s.roster.earlier.update(i.worker_id for i in (*opened.members, *spares))
                balancing.replayed(s, s.layout, opened)
                world, s.layout, s.generation, s.committed = opened, opened.layout, opened.generation, opened.base
                divergence.opened(s, opened)
                beginning.opened(s, opened)
            case m.StepSettled(decision, evidence, lost=lost):
                s.decision, s.committed, s.evidence = decision, decision.base, evidence
                s.roster.gone.update(lost)
                assert world is not None
                divergence.remember(s, world, decision)
            case m.Restored():
                saving.restored(s, entry)
            case m.RunEnded():
                ended = entry
                s.trouble.forgive()
            case _:
                assert_never(entry)
    if ended is not None and not again:
        s.mode = Ended(ended.status, ended.error)
        return
    if witness is not None and not any(witness.generation <= at for _, at in s.restores):
        s.visible = witness.step
        s.trouble.reached(witness.step)
    s.saved_at_step = s.committed.step
    if world is None:
        return
    s.mode = Aborting(world, 0, 0.0, ran=False, awaited=set())
    if witness is not None and witness.generation == world.generation and not s.decided(world):
        s.witness = witness
        s.committed = Version(witness.step, witness.generation)
        s.mode = Running(world)


def _carried_out(s: State) -> dict[WorkerId, tuple[m.Held, ...]]:
    """What the survivors of the last decision hold, now that a world was opened after it: all have carried it out."""
    if s.decision is None or s.decision.void:
        return {}
    base = s.decision.base
    held: dict[WorkerId, tuple[m.Held, ...]] = {}
    for worker, answer in s.evidence.items():
        holdings = answer.held
        if s.decision.vote is not None and answer.prepared == base:
            holdings = (replace(holdings[0], version=base), *holdings[1:])
        held[WorkerId(worker)] = holdings
    return held


def _started(s: State, now: float, event: m.Started) -> None:
    s.journal.append(m.EpochBegun(s.epoch))
    for worker in event.alive:
        if not s.roster.add(worker):
            # The life before wrote down that it is out for good, but did not come to end it.
            s.roster.dying.add(worker.worker_id)
            s.say(m.Kill(worker.worker_id, "declared lost before the controller was restarted"))
    s.roster.begin()
    s.arrived = True  # the life before may have died before it asked for a place for them
    s.saved = saving.newest_first([v for v in event.saved if saving.in_line(s, v) and v not in s.distrusted])
    s.damaged = list(event.damaged)
    for error in event.damaged:
        s.log("checkpoint_damaged", error=error)
    s.resume = event.resume
    _show_settled(s)
    saving.forgotten(s)
    match s.mode:
        case Gathering():
            s.mode = Gathering(now)
            s.say(m.Status("starting"))
        case Running(world):
            s.liveness.begin(now)
            if len(s.survivors(world)) < world.size:
                repair.break_world(s, now, "worker lost" if s.survivors(world) else "resumed")
            else:
                watch.probe(s, now)
        case Aborting(world):
            repair.ask_for_promises(s, now, world, ran=False)
        case Forming() | Settling() | Ended():
            raise AssertionError(f"a replayed controller cannot be {s.mode}")
        case _:
            assert_never(s.mode)


def _show_settled(s: State) -> None:
    """Steps that a decision committed, but that the life before did not come to make visible."""
    votes = [r.vote for answer in s.evidence.values() for r in answer.unreported]
    if s.decision is not None and s.decision.vote is not None:
        votes.append(s.decision.vote)
    for vote in sorted(votes, key=lambda v: v.step):
        if vote.step == s.visible + 1 and saving.in_line(s, Version(vote.step, vote.generation)):
            s.show(vote, None)


# ---------------------------------------------------------------- workers come and go


def _ready(s: State, now: float, worker: WorkerInfo) -> None:
    if not s.roster.add(worker):
        return
    s.log(
        "worker_started",
        worker_id=worker.worker_id,
        node_id=worker.node_id,
        pid=worker.pid,
        device=worker.device,
        visible_devices=worker.visible_devices,
    )
    if isinstance(s.mode, Gathering):
        s.mode = replace(s.mode, since=now)
    s.arrived = True


def _lost(s: State, now: float, event: m.WorkerLost) -> None:
    """A death, or the confirmation of one."""
    worker_id, cause = event.worker_id, event.cause
    s.roster.dying.discard(worker_id)
    if worker_id in s.roster.gone:
        return
    if worker_id in s.roster.alive:
        repair.declare_lost(s, now, worker_id, cause, blameless=event.with_node)
    else:
        s.roster.remove(worker_id)
        _start_failed(s, now, 1, f"{worker_id} died while starting: {cause}")


def _start_failed(s: State, now: float, count: int, error: str) -> None:
    s.roster.start_failed(now, count)
    s.log("start_failed", count=count, error=error)
    if s.roster.hopeless:
        s.end("failed", f"workers cannot be started: {error}")


def _fill(s: State, now: float) -> None:
    if s.over:
        return
    missing = s.roster.to_start(now)
    if missing:
        s.say(m.Start(missing))
