"""Steps that commit, members that join, and the end of the run."""

from collections.abc import Sequence

from evenkeel.control import balancing, forming, repair, saving
from evenkeel.control import messages as m
from evenkeel.control.modes import Ended, Forming, Running
from evenkeel.control.state import State
from evenkeel.core.ids import Generation, Version
from evenkeel.core.vote import Flags, Timing, Vote
from evenkeel.core.world import World


def joined(s: State, event: m.Joined) -> None:
    if not isinstance(s.mode, Forming) or event.generation != s.mode.world.generation:
        return
    if event.worker_id in s.roster.alive:
        s.mode.awaited.discard(event.worker_id)
    if s.incident is not None:
        s.incident.joined(event.regroup_s, event.reshard_s)


def reported(s: State, now: float, reports: Sequence[m.Report], timings: Sequence[Timing] = ()) -> None:
    """Steps of which nothing was heard until now: each of them took as long as the others, as far as is known."""
    since, last = s.liveness.progress_at, reports[-1].vote.step if reports else 0
    each = (now - since) / max(1, last - s.visible)
    for report in reports[_stretch(s, now, reports, each) :]:
        if not s.accepts(report.vote):
            continue
        if report.vote.step > s.visible + 1:
            repair.break_world(s, now, "a report is missing")
            return
        newest = report is reports[-1]
        _committed(s, now - each * (last - report.vote.step), report, timings if newest else None)


def _stretch(s: State, now: float, reports: Sequence[m.Report], each: float) -> int:
    """The first of these steps, but never the newest, from which nothing follows; returns how many those are.

    What `_committed` comes to for them, in a third of the time: in most runs all but a few of the steps are such.
    """
    mode, last = s.mode, reports[-1].vote.step if reports else 0
    judging = s.balance is not None and s.balance.judged is not None
    if not isinstance(mode, Running) or s.incident is not None or s.liveness.first or s.trouble.present or judging:
        return 0
    generation, size, workers = mode.world.generation, mode.world.size, len(s.roster.alive)
    count = 0
    for report in reports[:-1]:
        vote = report.vote
        if vote.step != s.visible + 1 or vote.generation != generation or not vote.uneventful:
            break
        at = now - each * (last - vote.step)
        step_s = at - s.liveness.progress_at
        s.worker_seconds += workers * max(0.0, step_s)
        balancing.committed(s, step_s)
        s.liveness.committed(at)
        s.visible, s.witness = vote.step, vote
        s.commands.append(m.Metrics(vote, report.committed_at, size))
        count += 1
    if count:
        s.committed = Version(s.visible, generation)
        s.blamed.clear()
    return count


def _committed(s: State, now: float, report: m.Report, timings: Sequence[Timing] | None) -> None:
    """A step that everybody has committed, or will: a completed vote proves that all are alive."""
    vote = report.vote
    if isinstance(s.mode, Forming):
        forming.run(s, now, s.mode.world)
    s.committed = Version(vote.step, vote.generation)
    s.worker_seconds += len(s.roster.alive) * max(0.0, now - s.liveness.progress_at)
    balancing.committed(s, None if s.liveness.first else now - s.liveness.progress_at)
    s.liveness.committed(now)
    saving.show(s, now, vote, report.committed_at)
    s.blamed.clear()
    if isinstance(s.mode, Running):
        if s.incident is not None:
            s.log("incident", **s.incident.fields(now))
            balancing.repaired(s, now)
            s.incident = None
        _after_step(s, now, s.mode.world, vote, timings)


def _after_step(s: State, now: float, world: World, vote: Vote, timings: Sequence[Timing] | None) -> None:
    """`timings` are None after a step that is not the newest in what was heard: later ones say what is due."""
    verdict = s.trouble.verdict(vote.step + 1)
    if verdict is not None:
        s.end("failed", verdict)
    elif vote.leaves:
        s.pending &= ~Flags.PAUSE
        wanted = balancing.CAUSE if s.balance is not None and s.balance.wanted is not None else "pause"
        repair.break_world(s, now, "stop" if vote.flags & Flags.STOP else wanted)
    elif timings is not None and vote.step < s.policy.last_step:
        if balancing.measured(s, world, timings):
            s.pending |= Flags.PAUSE
        if saving.due(s, vote.step):
            s.pending |= Flags.CHECKPOINT
        if s.pending:
            forming.send_flags(s, world)


def finished(s: State, generation: Generation, eval_loss: float | None) -> None:
    """The final model is written; it may be heard before the last member's Joined."""
    world = s.world
    if not isinstance(s.mode, Forming | Running) or world is None or world.generation != generation:
        return
    if s.committed.step < s.policy.last_step:
        return
    if eval_loss is not None:
        s.log("validation", version=s.committed.step, loss=eval_loss)
    s.over = True


def end_if_over(s: State) -> None:
    """The final model is written: what is left is to wait for checkpoints under way.

    The end is journalled before commands are carried out: with a metrics line among them it waits for the next tick, or
    with a crash in between that line would never be written.
    """
    shown = s.over and any(isinstance(command, m.Metrics) for command in s.commands)
    if not s.over or shown or s.uploads or isinstance(s.mode, Ended):
        return
    if s.policy.checkpoint_every is None or saving.is_saved(s):
        s.end("finished")
    else:
        why = s.save_error or "the controller was restarted meanwhile"
        s.end("finished", f"step {s.committed.step} is not saved: {why}")
