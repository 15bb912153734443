"""The loop around the controller: an event in; its journal entries made durable; its commands started, in order.

Nothing here decides anything, and nothing here knows Ray: what the controller asks for goes to a Record (what is
written down) and to Hands (the workers and the clock).
"""

from collections.abc import Callable, Sequence
from typing import Protocol, assert_never

from evenkeel.control import messages as m
from evenkeel.control.controller import Controller
from evenkeel.core.ids import WorkerId

ToWorker = m.Abort | m.Settle | m.Form | m.Request | m.Probe


class Hands(Protocol):
    """Starts commands; none of these waits for what it brings about."""

    def send(self, command: ToWorker) -> None: ...

    def start(self, count: int) -> None: ...

    def kill(self, worker: WorkerId, reason: str) -> None: ...

    def commit_checkpoint(self, command: m.CommitCheckpoint) -> None: ...

    def look_at(self, command: m.LookAt) -> None: ...

    def set_timer(self, at: float) -> None: ...

    def committed(self, step: int) -> None:
        """A step has become visible."""


class Record(Protocol):
    """Writes down what happened. Journal and status are durable when a call returns, lines after a flush."""

    @property
    def durable(self) -> int:
        """The last step whose metrics line is durable."""

    def trace(self, now: float, event: m.Event, output: m.Output) -> None: ...

    def journal(self, entries: Sequence[m.Entry]) -> None:
        """Raises JournalFenced if another controller has written the next file."""

    def world(self, entry: m.WorldOpened) -> None: ...

    def metrics(self, line: m.Metrics) -> None: ...

    def flush(self) -> None:
        """Makes every line so far durable."""

    def log(self, line: m.Log) -> None: ...

    def status(self, status: m.Status | m.End) -> None: ...


class Shell:
    """One life of the controller, driven by `feed`.

    Args:
        now: seconds, never going back.
        ended: called once, with the End.
    """

    def __init__(
        self,
        controller: Controller,
        record: Record,
        hands: Hands,
        now: Callable[[], float],
        ended: Callable[[m.End], None],
    ) -> None:
        self._controller = controller
        self._record = record
        self._hands = hands
        self._now = now
        self._ended = ended

    def feed(self, event: m.Event) -> int:
        """Hears one event. Returns the last step that is durable.

        Raises:
            JournalFenced: another controller has taken the run over; this one is to end without a further word.
        """
        now = self._now()
        output = self._controller.step(now, event)
        # What went in and out is written before it takes effect, so that a replay knows all that anybody was told.
        self._record.trace(now, event, output)
        if output.journal:
            self._record.journal(output.journal)
        for command in output.commands:
            if isinstance(command, m.Abort | m.CommitCheckpoint):
                # An abort acknowledges steps, and whoever goes on from a checkpoint finds the lines of the steps up to
                # it: also that of the step which this very event has shown.
                self._record.flush()
            self._start(command)
        for entry in output.journal:
            if isinstance(entry, m.WorldOpened):
                self._record.world(entry)  # not before the members are told: they need not wait for it
        return self._record.durable

    def _start(self, command: m.Command) -> None:
        match command:
            case m.Abort() | m.Settle() | m.Form() | m.Request() | m.Probe():
                self._hands.send(command)
            case m.Kill(worker_id, reason):
                self._hands.kill(worker_id, reason)
            case m.Start(count):
                self._hands.start(count)
            case m.CommitCheckpoint():
                self._hands.commit_checkpoint(command)
            case m.LookAt():
                self._hands.look_at(command)
            case m.SetTimer(at):
                self._hands.set_timer(at)
            case m.Metrics(vote):
                self._record.metrics(command)
                self._hands.committed(vote.step)
            case m.Log():
                self._record.log(command)
            case m.Status():
                self._record.status(command)
            case m.End():
                self._record.status(command)
                self._ended(command)
            case _:
                assert_never(command)
