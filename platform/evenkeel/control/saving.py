"""Checkpoints: when one is due, who still writes, when it is complete; and which one to go back to.

A checkpoint is known by its version: a version is voted once, and no generation is used twice (rule 15), so nothing of
two attempts is ever mixed. A change of world does not end the writing of one; only a death before the part is written
does, or the store. A life of the controller that does not know of an attempt leaves it alone: it stays invisible.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from evenkeel.control import divergence
from evenkeel.control import messages as m
from evenkeel.control.modes import Ended
from evenkeel.control.state import State
from evenkeel.core.ids import INITIAL, Version, WorkerId
from evenkeel.core.layout import Layout
from evenkeel.core.vote import Flags, Vote
from evenkeel.plan.interval import failures_per_second, steps_between

COST_S = 1.0
"""What a checkpoint is taken to cost before one was measured."""
ANOTHER = "import it again into the directory of a new run (another run.name)"
SILENT_S = 120.0
"""Without news of a checkpoint that an ended run waits for, before it ends without."""


@dataclass
class Upload:
    """A checkpoint that is being written.

    Attributes:
        missing: whose part has not come yet.
        news_at: when it last came nearer to its end.
        committing: the manifest is being written.
        stall_s: for how long the slowest copy has held up the training.
        error: why it will not be completed; `blameless` if that is not the store's fault.
    """

    layout: Layout
    missing: set[WorkerId]
    begun_at: float
    news_at: float
    parts: dict[WorkerId, str] = field(default_factory=dict)
    committing: bool = False
    stall_s: float = 0.0
    error: str = ""
    blameless: bool = False

    def add(self, part: m.PartWritten) -> None:
        """A part that was missing is written."""
        self.missing.discard(part.worker_id)
        self.parts[part.worker_id] = part.part
        if part.stall_s > self.stall_s:
            self.stall_s = part.stall_s


# ---------------------------------------------------------------- writing one


def show(s: State, now: float, vote: Vote, committed_at: float | None) -> None:
    """A committed step becomes visible; see State.show. Its checkpoint, if it has one, is being written from now on."""
    s.show(vote, committed_at)
    begin(s, now, vote)


def begin(s: State, now: float, vote: Vote) -> None:
    """A vote has become visible; if it says so, every member of its world copies its part and writes it."""
    if not vote.saves:
        return
    s.pending &= ~Flags.CHECKPOINT
    s.saved_at_step = vote.step
    version = Version(vote.step, vote.generation)
    upload = _upload(s, now, version)
    s.log("checkpoint_started", checkpoint=vote.step)
    for worker in sorted(upload.missing - s.roster.alive.keys()):
        lost(s, worker)
    _go_on(s, version)


def written(s: State, now: float, event: m.PartWritten) -> None:
    _moved(s, now, event.worker_id)
    upload = s.uploads.get(event.version)
    if upload is None and _is_known(s, event.version):
        upload = _upload(s, now, event.version)
    if upload is not None and event.worker_id in upload.missing:
        upload.add(event)
        if not upload.missing:
            _go_on(s, event.version)


def parts_written(s: State, now: float, events: Iterator[m.PartWritten]) -> int:
    """Takes down the first of these from which nothing follows, as other parts of their checkpoint are missing; returns
    how many those are."""
    count, version, upload = 0, None, None
    for event in events:
        if event.version is not version:
            version, upload = event.version, s.uploads.get(event.version)
        if upload is None or upload.error or len(upload.missing) < 2 or event.worker_id not in upload.missing:
            break
        if len(s.uploads) > 1:
            _moved(s, now, event.worker_id)
        upload.news_at = now
        upload.add(event)
        count += 1
    return count


def still_writing(s: State, now: float, event: m.StillWriting) -> None:
    _moved(s, now, event.worker_id)


def _moved(s: State, now: float, worker_id: WorkerId) -> None:
    """This worker writes one part after the other: each of those that it still owes comes nearer with any of them."""
    for upload in s.uploads.values():
        if worker_id in upload.missing:
            upload.news_at = now


def failed(s: State, now: float, event: m.PartFailed) -> None:
    """The store has failed for good, or for longer than its users wait: training goes on, and that is told."""
    _moved(s, now, event.worker_id)
    if _is_known(s, event.version):
        upload = _upload(s, now, event.version)
        upload.error = upload.error or f"{event.worker_id}: {event.error}"
        _go_on(s, event.version)


def lost(s: State, worker_id: WorkerId) -> None:
    """What this worker had not written yet is not written: another checkpoint is asked for."""
    for version in [v for v, upload in s.uploads.items() if worker_id in upload.missing]:
        s.uploads[version].error = f"{worker_id} died before its part was written"
        s.uploads[version].blameless = True
        _go_on(s, version)


def settled(s: State, decision: m.Decision) -> None:
    """A generation is closed: what some began to save of a step of it that was not committed is nothing."""
    for version in [v for v in s.uploads if v.generation == decision.generation and v.step > decision.base.step]:
        del s.uploads[version]


def _is_known(s: State, version: Version) -> bool:
    """Whether this life knows that it is being saved: what is told of it may come before the vote becomes visible."""
    world = s.world
    if version in s.uploads or world is None:
        return version in s.uploads
    return version.generation == world.generation and version.step > s.visible and not s.decided(world)


def _upload(s: State, now: float, version: Version) -> Upload:
    if version not in s.uploads:
        assert s.world is not None
        s.uploads[version] = Upload(s.world.layout, set(s.world.layout.members), now, now)
    return s.uploads[version]


def _go_on(s: State, version: Version) -> None:
    """Completes an attempt whose parts are all there, or gives it up; not before its step is visible (rule 4)."""
    upload = s.uploads.get(version)
    if upload is None or version.step > s.visible or upload.committing:
        return
    if upload.error:
        _give_up(s, version, upload)
    else:
        _complete(s)


def _complete(s: State) -> None:
    """Has the newest manifest written whose parts are all there: one at a time, and none that is overtaken."""
    whole = [v for v, u in s.uploads.items() if not u.missing and v.step <= s.visible and not u.committing]
    for overtaken in newest_first(whole)[1:]:
        del s.uploads[overtaken]
    if whole and not any(upload.committing for upload in s.uploads.values()):
        version = newest_first(whole)[0]
        upload = s.uploads[version]
        upload.committing = True
        s.manifests.add(version)
        parts = tuple(part for _, part in sorted(upload.parts.items()))
        agreed = (v for v in newest_first([version, *s.saved]) if divergence.agreed(s, v))
        s.say(m.CommitCheckpoint(version, s.epoch, upload.layout, parts, tuple(s.saved), next(agreed, None)))


def _give_up(s: State, version: Version, upload: Upload) -> None:
    s.uploads.pop(version, None)
    s.save_error = upload.error
    if upload.blameless:
        s.pending |= Flags.CHECKPOINT
    else:
        s.save_failures += 1
    s.log("checkpoint_failed", checkpoint=version.step, error=upload.error, in_a_row=s.save_failures)
    _complete(s)


def end_if_failing(s: State) -> None:
    """So many in a row failed that the run is to end; but not once it has its result."""
    most = s.policy.max_checkpoint_failures
    if most is not None and s.save_failures >= max(1, most) and not s.over and not isinstance(s.mode, Ended):
        s.end("failed", f"{s.save_failures} checkpoints in a row could not be written: {s.save_error}")


def committed(s: State, now: float, event: m.CheckpointCommitted) -> None:
    """The manifest is there. Also of an attempt that was given up here: what is complete can be gone back to."""
    s.manifests.discard(event.version)
    _keep(s, event.version)
    s.saved = [v for v in s.saved if v.step not in event.removed]
    upload = s.uploads.pop(event.version, None)
    for older in [v for v in s.uploads if _age(v) < _age(event.version) and not s.uploads[v].committing]:
        # Whoever copied for the newer one had written the older: it is only the word of that which is missing.
        del s.uploads[older]
    s.save_failures = 0
    took = {}
    if upload is not None:
        took = {"seconds": round(now - upload.begun_at, 6)}
        s.save_cost_s = upload.stall_s or s.save_cost_s
    s.log("checkpoint_committed", checkpoint=event.version.step, bytes=event.bytes, **took)
    _complete(s)


def refused(s: State, version: Version, error: str) -> None:
    """The manifest could not be written; or it was, and only the answer is lost."""
    s.manifests.discard(version)
    s.unsure.add(version)
    if version in s.uploads:
        s.uploads[version].error = error
        _give_up(s, version, s.uploads[version])


def tick(s: State, now: float) -> None:
    """Nobody waits for ever for a checkpoint that makes no progress; matters only when nothing else is left to do."""
    silent = {v: upload for v, upload in s.uploads.items() if now >= upload.news_at + SILENT_S}
    for version, upload in silent.items():
        upload.error = f"no progress in {SILENT_S:.0f} s"
        _give_up(s, version, upload)


def next_tick(s: State) -> float | None:
    return min((upload.news_at + SILENT_S for upload in s.uploads.values()), default=None)


# ---------------------------------------------------------------- when


def due(s: State, step: int) -> bool:
    """Whether the controller is to ask for one now: with checkpoint.every_steps 0 at the optimal interval."""
    at = due_at(s)
    return at is not None and step >= at


def due_at(s: State) -> int | None:
    """The step after which it is to ask for one, by what it knows now; None if it does not know, or never is to."""
    if s.policy.checkpoint_every != 0 or s.liveness.step_s == 0 or s.uploads:
        return None
    workers = max(1, len(s.roster.alive))
    rate = failures_per_second(s.total_losses, s.worker_seconds, workers)
    return s.saved_at_step + steps_between(s.save_cost_s or COST_S, s.liveness.step_s, 1 / rate)


# ---------------------------------------------------------------- going back


def newest_first(versions: Sequence[Version]) -> list[Version]:
    """Generations only grow, also when a run goes back: so the newest has the highest (generation, step)."""
    return sorted(set(versions), key=_age, reverse=True)


def in_line(s: State, version: Version) -> bool:
    """Whether the state that the run has now came about by way of this version (rule 7), as far as it went back."""
    made = s.generation + 1
    for base, at in reversed(s.restores):
        if at >= made:
            continue  # it took nothing back of what a later one went back to
        if version.generation > at:
            return True
        if _age(version) > _age(base):
            return False
        made = base.generation
    return True


def restore(s: State, what: str) -> None:
    """Goes back to the newest checkpoint there is, for the reason `what`; before the first one, to the beginning.

    Ends the run if it had checkpoints, but none that can be read: to begin anew would be no help; if what it began from
    was put here, and is gone; or if it is to stop.
    """
    again = bool(s.restores) and s.restores[-1][0] == s.committed  # only that checkpoint could not be read
    if s.saved:
        base = s.saved[0]
        go_back(s, base, f"{what}; back to the checkpoint of step {base.step}", loss=not again)
    elif s.policy.checkpoint_every is None:
        s.end("failed", what)
    elif s.damaged:
        way_out = f"; {ANOTHER}" if s.committed == s.imported else ""
        s.end("failed", f"{what}, and no checkpoint can be read: {s.damaged[-1]}{way_out}")
    elif s.imported is not None:
        gone = f"the checkpoint of step {s.imported.step} that was put here to begin from is gone"
        s.end("failed", f"{what}, and {gone}; {ANOTHER}")
    else:
        none = "there is no checkpoint whose copies agreed" if s.distrusted else "there is no checkpoint yet"
        go_back(s, INITIAL, f"{what}, and {none}; back to the beginning", loss=not again)
    if Flags.STOP in s.pending and not isinstance(s.mode, Ended):
        s.end("stopped", f"{s.stop_reason}; {what}")


def go_back(s: State, base: Version, reason: str, *, loss: bool = False) -> None:
    """Everything after `base` is gone, also where somebody still holds it (rule 6); journalled before anybody hears."""
    entry = m.Restored(base, s.generation, reason, loss)
    s.journal.append(entry)
    restored(s, entry)
    s.log("restored", base=base.step, reason=reason)


def restored(s: State, entry: m.Restored) -> None:
    """Also where the journal is replayed."""
    base = entry.base
    s.restores.append((base, entry.at))
    s.total_losses += entry.loss
    s.committed = base
    s.visible = s.saved_at_step = base.step
    s.witness = None
    s.doubt = ""
    s.saved = [v for v in s.saved if in_line(s, v)]
    s.uploads.clear()
    if base in (INITIAL, *s.saved):
        s.pending &= ~Flags.CHECKPOINT  # it was to save what is gone, and there is nothing else yet


def damaged(s: State, version: Version, error: str) -> None:
    """It is named, and not taken again."""
    if version in s.saved:
        s.saved.remove(version)
        s.damaged.append(error)
        s.log("checkpoint_damaged", error=error)


def found(s: State, version: Version) -> None:
    """Its manifest was said not to be written, and is there."""
    if _keep(s, version):
        s.log("checkpoint_found", checkpoint=version.step)


def forgotten(s: State) -> None:
    """What the life before has heard of the last checkpoint that was begun is lost: another is asked for."""
    if s.saving is None or s.policy.checkpoint_every is None:
        return
    version = Version(s.saving.step, s.saving.generation)
    if _is_new(s, version):
        s.pending |= Flags.CHECKPOINT
        error = "the controller that was to complete it is gone"
        s.log("checkpoint_failed", checkpoint=version.step, error=error, in_a_row=s.save_failures)


def _keep(s: State, version: Version) -> bool:
    """Whether a checkpoint that is there is one more that can be gone back to."""
    new = _is_new(s, version)
    if new:
        s.saved = newest_first([version, *s.saved])
    return new


def _is_new(s: State, version: Version) -> bool:
    return version not in (*s.saved, *s.distrusted) and in_line(s, version)


def newest(s: State) -> Version:
    """The checkpoint to go back to; the beginning if there is none."""
    return s.saved[0] if s.saved else INITIAL


def is_newest(s: State, version: Version) -> bool:
    """Whether no checkpoint is newer than this version.

    One whose parts are still being written may never be complete. One whose manifest is being written counts until its
    word is here: it may be visible, and older ones removed for it. To go back past it would leave nothing that counts.
    """
    return newest_first([version, *s.saved, *(s.manifests - s.distrusted)])[0] == version


def newer_is_coming(s: State) -> bool:
    """Whether a checkpoint is being written that is newer than all there are."""
    coming = {*s.uploads, *(s.manifests - s.distrusted)}
    return any(version not in s.saved and newest_first([version, *s.saved])[0] == version for version in coming)


def is_saved(s: State) -> bool:
    """Whether the committed version is in the store, or needs not be."""
    return s.committed == INITIAL or s.committed in s.saved


def _age(version: Version) -> tuple[int, int]:
    return version.generation, version.step
