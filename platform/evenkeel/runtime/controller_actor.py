"""The controller as a Ray actor: named, detached, restarted by Ray when its process dies. One event loop."""

import asyncio
import logging
import threading
import time
import traceback
from collections import deque
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import ray

from evenkeel.control import messages as m
from evenkeel.control.controller import Controller
from evenkeel.core.ids import WorkerId
from evenkeel.core.layout import WorkerInfo
from evenkeel.runtime import saving
from evenkeel.runtime.compat import drop_note, gcs_process, leave_note, log_folder, read_note
from evenkeel.runtime.faults import ControllerFaults
from evenkeel.runtime.fleet import Fleet
from evenkeel.runtime.logs import ProcessLog
from evenkeel.runtime.record import Past, RunRecord
from evenkeel.runtime.shell import Shell, ToWorker
from evenkeel.runtime.spec import RunSpec
from evenkeel.runtime.tasks import Tasks
from evenkeel.store.errors import JournalFenced, StoreError
from evenkeel.store.failures import transient
from evenkeel.store.lease import ELSEWHERE, RENEW_S, Holder, LeaseHeld, LeaseLost, Tenure, succeed
from evenkeel.store.retry import Trouble, Unhurried
from evenkeel.store.run_directory import RunDirectory

LATE_S = 0.05
"""A timer that fires later than this was held up, and so were the answers that it waits for: they are heard first."""
GRACE_S = 0.1
"""For them to come in."""
FOLLOW_S = 10.0
"""How long a follower's call waits for news."""
ALONE_S = 5.0
"""A follower that lives calls again sooner, also where the machine is busy."""
RELEASE_S = 10.0
"""After the end, for followers to hear of it."""
STOP, TROUBLE = "stop", "trouble"
"""Notes to and from a controller that is held up, see compat.leave_note."""
REMEMBERED = 20_000
"""Lines kept for followers that are behind."""


@dataclass(frozen=True, slots=True)
class News:
    """What happened since the last call.

    Attributes:
        epoch, cursor: to be given back in the next call.
        lines: ("metrics" | "event" | "status", the line as it stands in the run directory).
        end: the run is over, and every worker's process with it.
    """

    epoch: int
    cursor: int
    lines: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    end: m.End | None = None


class ControllerActor:
    """See the module. Its methods run on one event loop, so that none interrupts another but where it awaits."""

    def __init__(self, spec: RunSpec) -> None:
        self._spec = spec
        self._log = ProcessLog(spec.folder, "controller")
        self._loop: asyncio.AbstractEventLoop | None = None
        self._id = str(ray.get_runtime_context().get_actor_id())
        # What nothing can be decided without is waited for without end, and a checkpoint only so long.
        self._patience = Unhurried(self._is_asked_to_stop)
        self._run = RunDirectory.at(spec.folder).patient(self._storage_trouble, self._patience.wait, self._patience)
        # What is changed there is to be changed by nobody but who runs the run.
        held = RunDirectory.at(spec.folder).fenced(self._check_held)
        self._checkpoints = held.patient(self._storage_trouble, threading.Event().wait)
        self._untidied = False
        self._stop_reason = ""
        self._store_is_away = False
        self._faults = ControllerFaults(self._run, spec.faults)
        self._begun = asyncio.Event()
        self._news = asyncio.Event()
        self._released = asyncio.Event()
        self._lines: deque[tuple[str, dict[str, Any]]] = deque(maxlen=REMEMBERED)
        self._count = 0
        self._epoch = 0
        self._beginning = False
        self._end: m.End | None = None
        self._over = False
        self._timer: asyncio.TimerHandle | None = None
        self._followers = 0
        self._followed_at = time.monotonic()
        self._tasks = Tasks(self._failed)
        self._early: list[m.Event] | None = []
        """What the fleet tells before the controller has heard Started, its first event; None from then on."""
        self._myself = ray.get_runtime_context().current_actor
        # Ray runs this constructor again after a death, but nobody's calls: so it calls itself.
        self._myself.begin.remote()

    # Without retries the call is lost if the news that this actor is being restarted comes to itself just after it.
    @ray.method(max_task_retries=-1)
    async def begin(self) -> None:
        """Takes the run up where the journal ends. Called once in each life of this process."""
        if self._beginning:
            return
        self._beginning = True
        self._loop = asyncio.get_running_loop()
        try:
            spec = self._spec
            self._record = RunRecord(self._run, spec.global_batch, spec.lr, self._publish, log_folder())
            holder, wait = Holder.this(spec.cluster, gcs_process() or ELSEWHERE), threading.Event().wait
            self._tenure = await asyncio.to_thread(succeed, self._run.files, holder, wait)
            # Not before: what the one before appends until it has lost the lease would fence this one out.
            past = self._record.begin(spec.policy)
            self._epoch = past.epoch + 1
            await asyncio.to_thread(self._tenure.renew, self._epoch)
            self._record.complete(past)
            again = len(past.entries) <= spec.begun
            controller = Controller(spec.policy, self._epoch, past.entries, past.shown, again)
            self._fleet = Fleet(spec.name, spec.worker, self._myself, self._hear, self._tasks.spawn, past.workers)
            alive = await self._fleet.find(past.known) if past.entries else ()
            self._shell = Shell(controller, self._record, self, time.monotonic, self._ended)
            started = self._started(alive, past)
        except LeaseHeld as error:
            self._ended(m.End("failed", str(error)))
            return
        except Exception as error:  # the border of the process: a run that cannot begin says why
            traceback.print_exc()
            self._ended(self._end_by(error))
            return
        if past.ended is not None and not again:
            self._ended(past.ended)
        else:
            if again and spec.emulated:
                self._record.log(m.Log("emulated", 0, 0, dict(spec.emulated)))
            self._feed(started)
        early, self._early = self._early or [], None
        for event in early:  # those found may have died since, and those that were starting be ready
            self._feed(event)
        self._begun.set()
        self._tasks.spawn(self._watch_followers())
        self._tasks.spawn(self._keep_lease(self._tenure))

    # ------------------------------------------------------------ called by workers and drivers

    async def hear(self, event: m.Event) -> int:
        """Takes an event; returns the last step that is durable once all that follows from the event is, too."""
        await self._begun.wait()
        return self._feed(event)

    async def follow(self, epoch: int, cursor: int) -> News:
        """What happened since `cursor` of this controller's life; waits for it for a while. Begin with (0, 0)."""
        self._followers += 1
        cursor = cursor if epoch == self._epoch else 0
        try:
            if cursor >= self._count and not self._over:
                await self._wait_for_news()
        finally:  # Ray cancels the call of a driver that died
            self._followers -= 1
            self._followed_at = time.monotonic()
        start = max(0, len(self._lines) - (self._count - cursor))
        lines = list(self._lines)[start:] if start < len(self._lines) else []
        return News(self._epoch, self._count, lines, self._end if self._over else None)

    async def folder(self) -> str:
        """Of the run that this controller runs."""
        return self._spec.folder

    async def ended(self) -> bool:
        """Whether the run is over: then nobody is to follow this controller any more."""
        return self._end is not None

    async def release(self) -> None:
        """The last follower has heard of the end: the controller ends itself."""
        self._released.set()

    # ------------------------------------------------------------ the shell's hands

    def send(self, command: ToWorker) -> None:
        if isinstance(command, m.Settle):
            self._faults.fire("recovery", command.decision.base.step + 1)
        self._fleet.send(command)

    def start(self, count: int) -> None:
        self._fleet.start(count)

    def kill(self, worker: WorkerId, reason: str) -> None:
        self._fleet.kill(worker, reason)

    def committed(self, step: int) -> None:
        self._fleet.committed(step)
        self._faults.fire("step", step + 1)

    def commit_checkpoint(self, command: m.CommitCheckpoint) -> None:
        self._tasks.spawn(self._complete(command))

    async def _complete(self, command: m.CommitCheckpoint) -> None:
        try:
            event = await asyncio.to_thread(self._write_manifest, command)
        except (LeaseLost, JournalFenced) as error:
            self._yield_to_another(error)
            return
        except Exception as error:  # the border of a thread: a checkpoint that cannot be completed is an event
            event = m.CheckpointFailed(command.version, _words(error))
        self._feed(event)

    def _write_manifest(self, command: m.CommitCheckpoint) -> m.Event:
        self._faults.fire("write", command.version.step)
        event = saving.complete(self._checkpoints, self._spec, command, self._untidy)
        self._faults.fire("written", command.version.step)
        return event

    def _check_held(self) -> None:
        """The fence of rule 10 where something is to change that a successor rests on. From any thread."""
        self._tenure.check()
        self._record.check()

    def _untidy(self, error: StoreError) -> None:
        """From a thread. Told once: it only takes room, and each checkpoint tries again."""
        saving.warn(error)
        if not self._untidied and self._loop is not None:
            self._untidied = True
            text = f"not all of older checkpoints could be removed: {error}"
            self._loop.call_soon_threadsafe(self._hear, m.StorageTrouble(WorkerId("controller"), text))

    def look_at(self, command: m.LookAt) -> None:
        self._tasks.spawn(self._look(command))

    async def _look(self, command: m.LookAt) -> None:
        """With the patience of what nothing can be decided without; a store that fails for good ends the run."""
        self._feed(await asyncio.to_thread(saving.look, self._run, command))

    def set_timer(self, at: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = asyncio.get_running_loop().call_at(at, self._tick, at)

    # ------------------------------------------------------------ inside

    def _started(self, alive: tuple[WorkerInfo, ...], past: Past) -> m.Started:
        """With the checkpoints there are, and what the user asks to begin from, unless a life before has heeded it."""
        saved, damaged = saving.find(self._run)
        since = past.entries[self._spec.begun :]
        heeded = any(isinstance(entry, m.Restored | m.WorldOpened) for entry in since)
        return m.Started(alive, saved, damaged, None if heeded else self._spec.resume)

    def _tick(self, at: float) -> None:
        """Hears a Tick, but a late one only after what came in meanwhile: nobody is condemned for our own delay."""
        loop = asyncio.get_running_loop()
        if loop.time() > at + LATE_S:
            due = loop.time() + GRACE_S
            self._timer = loop.call_at(due, self._tick, due)
        else:
            self._timer = None
            self._feed(m.Tick())

    def _hear(self, event: m.Event) -> None:
        """For the fleet, which may call from within a command: the event is heard after it."""
        if self._early is not None:
            self._early.append(event)
        else:
            asyncio.get_running_loop().call_soon(self._feed, event)

    def _storage_trouble(self, trouble: Trouble) -> None:
        """From any thread, which waits then: often that of the event loop, so that nobody is answered meanwhile.

        Drivers find a note of it; the event is heard once the store is there again.
        """
        if not trouble.is_news:
            return
        logging.warning("the store fails, attempt %d: %s", trouble.attempt, trouble.error)
        text = f"the store has failed for {trouble.since_s:.0f} s and is tried again and again: {trouble.error}"
        leave_note(self._id, TROUBLE, text)
        if self._loop is not None:
            event = m.StorageTrouble(WorkerId("controller"), str(trouble.error))
            self._loop.call_soon_threadsafe(self._hear_trouble, event)

    def _hear_trouble(self, event: m.StorageTrouble) -> None:
        drop_note(self._id, TROUBLE)
        self._hear(event)

    def _is_asked_to_stop(self) -> bool:
        """While this loop waits for the store no call is heard, so drivers leave a note, too."""
        self._stop_reason = self._stop_reason or read_note(self._id, STOP)
        return bool(self._stop_reason)

    def _feed(self, event: m.Event) -> int:
        if self._end is not None:
            return 0
        if isinstance(event, m.StopRequested):
            self._stop_reason = event.reason
            self._patience.hurry()
        try:
            return self._shell.feed(event)
        except JournalFenced as error:
            self._yield_to_another(error)
        except Exception as error:  # the border of the process
            self._failed(error)
        return 0

    def _failed(self, error: BaseException) -> None:
        """A defect, or a store that takes nothing any more: it ends the run and is told, it does not hang it."""
        traceback.print_exception(error)
        if self._end is not None:
            return
        end = self._end_by(error)
        self._patience.hurry()
        try:
            if not isinstance(error, StoreError):  # which was waited for; the driver tries once more
                with suppress(StoreError):
                    self._record.status(end)
        finally:
            self._ended(end)

    def _end_by(self, error: BaseException) -> m.End:
        """A store that is away for a while fails nothing but the saving of a run that is to stop."""
        self._store_is_away = isinstance(error, StoreError) and transient(error)
        if self._store_is_away and self._stop_reason:
            return m.End("stopped", f"{self._stop_reason}, without saving, as the store is out of reach: {error}")
        return m.End("failed", _words(error))

    def _yield_to_another(self, error: StoreError) -> None:
        """Rule 10: somebody else runs this run now. Not one more word to anybody, and no other life."""
        logging.error("another controller has taken the run over, this one ends: %s", error)
        self._end = m.End("failed", "another controller has taken the run over")
        ray.kill(self._myself)

    async def _keep_lease(self, tenure: Tenure) -> None:
        """Shows that this controller lives, as long as it does. While the store fails, others may come to doubt it."""
        while self._end is None:
            await asyncio.sleep(RENEW_S)
            try:
                await asyncio.to_thread(tenure.renew)
            except LeaseLost as error:
                self._yield_to_another(error)
            except StoreError as error:
                logging.warning("the lease could not be renewed: %s", error)

    def _ended(self, end: m.End) -> None:
        self._end = end
        self._patience.hurry()
        if self._timer is not None:
            self._timer.cancel()
        self._begun.set()
        self._tasks.spawn(self._wind_up())

    async def _wind_up(self) -> None:
        try:
            if hasattr(self, "_fleet"):
                await self._fleet.close()
            if hasattr(self, "_tenure") and not self._store_is_away:
                with suppress(StoreError):
                    await asyncio.to_thread(self._tenure.release)
            self._log.publish()
        finally:  # whatever became of that, the driver is waiting
            self._over = True
            self._publish("", {})
            with suppress(TimeoutError):
                await asyncio.wait_for(self._released.wait(), RELEASE_S)
            ray.kill(self._myself)

    def _publish(self, kind: str, line: dict[str, Any]) -> None:
        if kind:
            self._lines.append((kind, line))
            self._count += 1
        self._news.set()

    async def _wait_for_news(self) -> None:
        self._news.clear()
        with suppress(TimeoutError):
            await asyncio.wait_for(self._news.wait(), FOLLOW_S)

    async def _watch_followers(self) -> None:
        pause_s = min(FOLLOW_S, self._spec.orphan_s / 4)
        while self._end is None:
            began = time.monotonic()
            await asyncio.sleep(pause_s)
            # While the store held this loop up no follower could be heard.
            self._followed_at += max(0.0, time.monotonic() - began - pause_s)
            alone_s = 0.0 if self._followers else time.monotonic() - self._followed_at
            if self._end is None and alone_s > max(self._spec.orphan_s, ALONE_S):
                self._feed(m.StopRequested(f"without a driver for {alone_s / 60:.2g} minutes"))
                return


def _words(error: BaseException) -> str:
    if isinstance(error, StoreError):
        return str(error)
    text = str(error).splitlines()[0] if str(error) else ""
    return f"internal error in the controller: {type(error).__name__}: {text}"
