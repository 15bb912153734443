"""What the controller writes down: journal, worlds, metrics, events, status, and a trace to replay it from."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from evenkeel.control import messages as m
from evenkeel.control.entries import NOTHING_SHOWN, Shown
from evenkeel.control.policy import Policy
from evenkeel.core.codec import dump, load
from evenkeel.core.ids import WorkerId
from evenkeel.core.vote import Vote
from evenkeel.observe.events import MetricsClock, event_record
from evenkeel.runtime.names import number_of
from evenkeel.runtime.trace import Trace
from evenkeel.store.errors import StoreError
from evenkeel.store.run_directory import RunDirectory, world_record

FLUSH_LINES = 16
"""Unflushed metrics lines at most: a quarter of what a leader may have unacknowledged before it waits."""

CHECKPOINT_FAILED = "checkpoint_failed"

Publish = Callable[[str, dict[str, Any]], None]


@dataclass(frozen=True, slots=True)
class Past:
    """What earlier lives of the controller left; empty in a new run.

    Attributes:
        epoch: the highest so far.
        shown: what metrics.jsonl says.
        known: the workers that were ready at some time, also those that are dead by now.
    """

    entries: tuple[m.Entry, ...] = ()
    epoch: int = 0
    shown: Shown = NOTHING_SHOWN
    known: frozenset[WorkerId] = frozenset()

    @property
    def workers(self) -> int:
        """The highest number of a worker so far."""
        return max((number_of(worker) or 0 for worker in self.known), default=0)

    @property
    def ended(self) -> m.End | None:
        last = self.entries[-1] if self.entries else None
        return m.End(last.status, last.error) if isinstance(last, m.RunEnded) else None


class RunRecord:
    """Writes into one run directory; implements shell.Record.

    Args:
        lr: the learning rate of a step.
        publish: is told every line of metrics and events, and the status, after it was written.
        local_logs: where the trace goes if the run directory is not on a local path.
    """

    def __init__(
        self, run: RunDirectory, global_batch: int, lr: Callable[[int], float], publish: Publish, local_logs: Path
    ) -> None:
        self._run = run
        self._clock = MetricsClock(global_batch)
        self._lr = lr
        self._publish = publish
        self._journal = run.journal()
        self._epoch = 0
        self._unflushed = 0
        self._visible = 0
        self._durable = 0
        self._local = run.log_folder is not None
        self._logs = Path(run.log_folder) if run.log_folder is not None else local_logs
        self._trace: Trace | None = None

    def begin(self, policy: Policy) -> Past:
        """Reads what earlier lives left and begins the next epoch, with a trace of its own."""
        entries = tuple(load(entry, m.Entry) for entry in self._journal.read_all())
        lines = self._run.metrics()
        if lines:
            self._clock.last_commit_s = lines[-1]["time"]
            self._durable = self._visible = lines[-1]["step"]
        epochs = [entry.epoch for entry in entries if isinstance(entry, m.EpochBegun)]
        events = self._run.events()
        self._clock.checkpoint_failures = sum(event["event"] == CHECKPOINT_FAILED for event in events)
        past = Past(entries, max(epochs, default=0), _shown(lines), frozenset(_known(entries, events)))
        self._epoch = past.epoch + 1
        self._begin_trace(policy, past)
        return past

    def complete(self, past: Past) -> None:
        """Writes down the worlds that an earlier life opened and died too soon to: their members train all the same."""
        opened = [entry for entry in past.entries if isinstance(entry, m.WorldOpened)]
        written = set(self._run.generations()) if opened else set()
        for entry in opened:
            if entry.world.generation not in written:
                self.world(entry)

    # ------------------------------------------------------------ shell.Record

    @property
    def durable(self) -> int:
        """The last step whose metrics line is durable."""
        return self._durable

    def trace(self, now: float, event: m.Event, output: m.Output) -> None:
        """One line: when, what was heard, and in short what it led to."""
        assert self._trace is not None
        commands = [_short(command) for command in output.commands]
        line = {"now": now, "event": dump(event, m.Event), "commands": commands, "entries": len(output.journal)}
        self._trace.write(line)

    def journal(self, entries: Sequence[m.Entry]) -> None:
        self._journal.append(self._epoch, [dump(entry, m.Entry) for entry in entries])

    def check(self) -> None:
        """Raises JournalFenced if another controller goes on with this journal. From any thread."""
        self._journal.check()

    def world(self, entry: m.WorldOpened) -> None:
        self._run.write_world(world_record(entry.world, entry.spares, time.time()))

    def metrics(self, line: m.Metrics) -> None:
        step = line.vote.step
        record = {**self._clock.record(line, self._lr(step), time.time()), "vote": list(line.vote.values)}
        self._run.append_metrics(record)
        self._unflushed += 1
        self._visible = step
        if self._local or self._unflushed >= FLUSH_LINES:
            self.flush()
        self._publish("metrics", record)

    def log(self, line: m.Log) -> None:
        record = event_record(line, time.time())
        self._run.append_event(record)
        self._clock.checkpoint_failures += line.event == CHECKPOINT_FAILED
        self._publish("event", record)

    def status(self, status: m.Status | m.End) -> None:
        before = self._run.read_run()
        if before is None:
            raise StoreError(f"{self._run.url}: run.json is gone")
        now = time.time()
        if isinstance(status, m.End):
            self._run.flush()
            after = replace(before, status=status.status, error=status.error, waiting_for="", updated=now, ended=now)
        else:
            after = replace(before, status=status.status, waiting_for=status.waiting_for, updated=now)
        self._run.write_run(after)
        self._publish("status", {"status": after.status, "waiting_for": after.waiting_for, "error": after.error})

    def flush(self) -> None:
        """Makes every line so far durable."""
        self._run.flush()
        self._unflushed = 0
        self._durable = self._visible

    def close(self) -> None:
        """Writes out what is not yet durable; nothing can be written after it."""
        self._run.close()
        if self._trace is not None:
            self._trace.close()

    # ------------------------------------------------------------ inside

    def _begin_trace(self, policy: Policy, past: Past) -> None:
        self._trace = Trace(self._logs)
        head = {"policy": dump(policy, Policy), "epoch": self._epoch, "past": len(past.entries)}
        self._trace.write({**head, "shown": dump(past.shown, Shown)})


def _shown(lines: Sequence[Mapping[str, Any]]) -> Shown:
    """The time between two worlds is not worked: of a run that was stopped it may be days."""
    within = (line for before, line in pairwise(lines) if line["generation"] == before["generation"])
    worker_seconds = sum(line["world_size"] * (line["step_s"] or 0.0) for line in within)
    return Shown.of((_vote(line) for line in reversed(lines)), worker_seconds)


def _vote(line: Mapping[str, Any]) -> Vote:
    return Vote(line["generation"], line["step"], tuple(line["vote"]))


def _short(command: m.Command) -> str:
    """Enough to tell two replays apart without a copy of the world for each of its members."""
    to = getattr(command, "worker_id", "")
    return f"{type(command).__name__} {to}".rstrip()


def _known(entries: Sequence[m.Entry], events: Sequence[Mapping[str, Any]]) -> Iterator[WorkerId]:
    yield from (event["worker_id"] for event in events if event["event"] == "worker_started")
    for entry in entries:
        if isinstance(entry, m.WorldOpened):
            yield from (info.worker_id for info in (*entry.world.members, *entry.spares))
