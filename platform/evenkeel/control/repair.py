"""From a world that broke to a settled state: all survivors promise, the step is settled once, all carry it out."""

from collections.abc import Iterable

from evenkeel.control import balancing, divergence, looking, saving
from evenkeel.control import messages as m
from evenkeel.control.incident import Incident
from evenkeel.control.modes import Aborting, Forming, Gathering, Running, Settling
from evenkeel.control.settle import decide
from evenkeel.control.state import State
from evenkeel.core.ids import Version, WorkerId
from evenkeel.core.world import World


def break_world(s: State, now: float, cause: str, detect_s: float = 0.0) -> Incident:
    """Stops the world that is there: every survivor is to promise that it commits nothing more of it.

    A loss while a decision is being carried out asks everybody again; the decision stands (rule 6).
    """
    world = s.world
    assert world is not None
    if s.incident is None:
        s.incident = Incident(cause, now, detect_s)
    elif s.incident.planned:
        s.incident.cause = cause
    if isinstance(s.mode, Forming | Running | Settling):
        s.incident.abort(now)
        ask_for_promises(s, now, world, ran=isinstance(s.mode, Running))
    return s.incident


def ask_for_promises(s: State, now: float, world: World, ran: bool) -> None:
    s.asks += 1
    survivors = s.survivors(world)
    s.mode = Aborting(world, s.asks, now, ran, set(survivors))
    s.liveness.parking(now)
    epoch, generation, ask, visible = s.epoch, world.generation, s.asks, s.visible
    s.say(*[m.Abort(w, epoch, generation, ask, visible) for w in survivors])


def declare_lost(
    s: State, now: float, worker_id: WorkerId, cause: str, detect_s: float = 0.0, blameless: bool = False
) -> None:
    """From here on nothing that this worker says counts, whether it lives or not (rule 17)."""
    s.roster.remove(worker_id)
    if isinstance(s.mode, Aborting | Settling):
        s.mode.awaited.discard(worker_id)
    s.holdings.pop(worker_id, None)
    s.log("worker_lost", worker_id=worker_id, cause=cause)
    saving.lost(s, worker_id)
    balancing.lost(s, worker_id)
    world = s.world
    if world is not None and worker_id in world.layout.places and not s.over:
        incident = break_world(s, now, "worker lost", detect_s)
        incident.lost[worker_id] = cause
        if blameless:
            incident.blameless.add(worker_id)
        if incident.cause == "broken collective":
            # Its neighbours often notice a death before it is pushed.
            incident.cause = "worker lost"


def kill(s: State, now: float, worker_id: WorkerId, cause: str, detect_s: float = 0.0, blameless: bool = False) -> None:
    s.roster.dying.add(worker_id)
    s.say(m.Kill(worker_id, cause))
    declare_lost(s, now, worker_id, cause, detect_s, blameless)


def failed(s: State, now: float, event: m.Failed) -> None:
    """A training thread raised. A broken collective is somebody else's trouble; anything else is the worker's own."""
    world = s.world
    if world is None or world.generation != event.generation or s.decided(world):
        return
    if event.worker_id not in s.roster.alive or s.over:
        return
    fault = event.fault
    incident = break_world(s, now, "broken collective" if fault.collective else "exception")
    if fault.collective:
        incident.broken = incident.broken or f"{event.worker_id}: {fault.error}"
    else:
        text = _describe(event.worker_id, fault)
        s.trouble.exception(fault.step, event.generation, text)
        s.log("exception", worker_id=event.worker_id, text=text)
        incident.cause = "exception"
        incident.faults.append(text)


def unreadable(s: State, now: float, event: m.CheckpointUnreadable) -> None:
    """A worker could not read its part of the base: the world cannot begin. From what the next one does is not known
    before the controller has looked itself."""
    looking.unreadable(s, event)
    world = s.world
    if world is not None and world.generation == event.generation and not s.decided(world):
        break_world(s, now, "checkpoint unreadable")


def looked(s: State, now: float, event: m.Looked) -> None:
    """Of what is whole the run goes on from; whoever could not read that is at fault, and is replaced."""
    blamed = looking.answered(s, event)
    for worker, error in blamed.items():
        what = f"cannot read the checkpoint of step {event.version.step}, which is whole: {error}"
        info = s.roster.alive.get(worker)
        if info is None:
            continue
        s.trouble.cannot_read(s.generation, f"{worker} on node {info.node_id} {what}")
        kill(s, now, worker, what)
        if s.incident is not None:
            s.incident.lost[worker] = what
    verdict = s.trouble.verdict(s.committed.step + 1) if blamed else None
    if verdict is not None:
        s.end("failed", verdict)


def answered(s: State, event: m.Answered) -> None:
    mode = s.mode
    if isinstance(mode, Aborting) and mode.ask == event.ask and mode.world.generation == event.generation:
        mode.answers[event.worker_id] = event.answer
        mode.awaited.discard(event.worker_id)


def settle(s: State, now: float, mode: Aborting) -> None:
    """Every survivor has promised: decide, write down, tell."""
    world = mode.world
    if s.incident is not None:
        s.incident.answered_at = now
    if not s.decided(world):
        _decide(s, now, mode)
    verdict = s.trouble.verdict(s.committed.step + 1)
    if verdict is not None:
        s.end("failed", verdict)
        return
    assert s.decision is not None
    survivors = s.survivors(world)
    s.mode = Settling(world, mode.ask, now, s.decision, set(survivors))
    s.liveness.parking(now)
    epoch, ask, decision = s.epoch, mode.ask, s.decision
    s.say(*[m.Settle(w, epoch, ask, decision) for w in survivors])


def _decide(s: State, now: float, mode: Aborting) -> None:
    world = mode.world
    answers = {w: a for w, a in sorted(mode.answers.items()) if w in s.roster.alive}
    _show_unreported(s, now, answers.values())
    s.decision = decide(world, answers, s.witness)
    differ = s.decision.divergence
    odd = {} if differ is None else dict(divergence.blame(differ, s.roster.alive))
    lost = tuple(i.worker_id for i in world.members if i.worker_id not in s.roster.alive or i.worker_id in odd)
    s.evidence = {str(w): a for w, a in answers.items() if w not in odd}
    s.journal.append(m.StepSettled(s.decision, s.evidence, s.witness, lost))
    s.committed = s.decision.base
    saving.settled(s, s.decision)
    divergence.remember(s, world, s.decision)
    if differ is not None:
        break_world(s, now, divergence.CAUSE).cause = divergence.CAUSE
        divergence.tell(s, differ)
    for worker, cause in odd.items():
        kill(s, now, worker, cause)
    open_step = s.committed.step + 1
    in_next = any(_was_in_step(a, world, open_step) for a in answers.values())
    prepared = any(a.prepared is not None and a.prepared == s.committed for a in answers.values())
    vote = s.decision.vote
    if vote is not None and vote.step > s.visible:
        saving.show(s, now, vote, None)
    if vote is not None and prepared:
        # Whoever saw the vote has finished its commit before it answered; these commit by the decision.
        s.log("step_rolled_forward", reason=s.decision.reason)
        if s.incident is not None:
            s.incident.rolled_forward = True
    elif in_next:
        why = f"no survivor saw a vote of step {open_step}: it is run again"
        s.log("step_rolled_back", reason=why if differ is None else divergence.describe(differ))
    if s.incident is not None and not s.incident.planned:
        # Who dies in the commit of a step that is rolled forward is not held against the step after it.
        trained = mode.ran and (in_next or not answers)
        died = [w for w in lost if trained and w not in odd]
        who = [f"{w} ({s.incident.lost.get(w, 'lost')})" for w in died]
        suspect = not s.incident.blameless.issuperset(died)
        s.trouble.broken(open_step, s.incident.describe(), who, sure=bool(answers), suspect=suspect)


def _show_unreported(s: State, now: float, answers: Iterable[m.Answer]) -> None:
    """Steps that were committed, but whose report did not come through."""
    for answer in answers:
        for report in answer.unreported:
            if s.accepts(report.vote) and report.vote.step == s.visible + 1:
                saving.show(s, now, report.vote, report.committed_at)
                s.committed = Version(report.vote.step, report.vote.generation)


def _was_in_step(answer: m.Answer, world: World, step: int) -> bool:
    return answer.position.generation == world.generation and answer.position.step >= step


def settled(s: State, event: m.Settled) -> None:
    """The decision of a generation is one and the same whichever round told it, so an ask does not matter.

    It must not: of two rounds' commands the older may arrive last, and who commits by that one refuses the newer
    meanwhile. To wait for the newer's word would end in killing a worker that did all it was told.
    """
    mode = s.mode
    if isinstance(mode, Settling) and mode.world.generation == event.generation:
        mode.done[event.worker_id] = event.held
        mode.awaited.discard(event.worker_id)


def conclude(s: State, now: float, done: dict[WorkerId, tuple[m.Held, ...]]) -> None:
    """The decision is carried out everywhere: what the survivors hold is known.

    What is known of workers that had no place in this world stays true: a spare keeps its shards.
    """
    if s.incident is not None:
        s.incident.settled_at = now
    s.holdings = {w: held for w, held in {**s.holdings, **done}.items() if w in s.roster.alive}
    s.mode = Gathering(now)


def _describe(worker_id: WorkerId, fault: m.Fault) -> str:
    at = f"after step {fault.step - 1}" if fault.phase == "finish" else f"step {fault.step}"
    where = f"worker {worker_id}, {at}, {fault.phase}"
    if fault.layer:
        where += f", layer {fault.layer}, micro-batch {fault.micro}"
    return f"{where}: {fault.error}"
