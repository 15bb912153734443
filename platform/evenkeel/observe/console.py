"""Shows a run from its records: a live line on a terminal, plain lines in a log, a summary at the end."""

import sys
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, TextIO

from rich.console import Console as Terminal
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.text import Text

from evenkeel.observe import incident

Line = Mapping[str, Any]

LINES_PER_RUN = 30
"""About so many step lines stand in a log, evenly over the steps, …"""
SILENCE_S = 30.0
"""… and one more whenever so many seconds had none."""

_STYLES = {
    "worker_lost": "bold red",
    "exception": "bold red",
    "start_failed": "bold red",
    "incident_unfinished": "bold red",
    "checkpoint_failed": "yellow",
    "storage_trouble": "yellow",
    "checkpoint_unreadable": "yellow",
    "checkpoint_damaged": "bold red",
    "divergence": "bold red",
    "checkpoint_distrusted": "yellow",
    "emulated": "bold yellow",
    "restored": "bold yellow",
    "step_rolled_back": "yellow",
    "waiting": "yellow",
    "incident": "bold green",
}
_COMMON = ("time", "event", "generation", "step")


class Console:
    """Takes the lines of metrics and events in the order of their times. Use it as a context manager.

    Args:
        last_step: train.steps.
        out: where to; a terminal gets a progress line, anything else plain lines.
    """

    def __init__(self, last_step: int, out: TextIO | None = None) -> None:
        self._last_step = last_step
        self._terminal = Terminal(file=out or sys.stdout, highlight=False, soft_wrap=True)
        self._live = Live(self._terminal, last_step) if self._terminal.is_terminal else None
        self._cadence = Cadence(last_step)
        self._begun: float | None = None

    def __enter__(self) -> "Console":
        if self._live:
            self._live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._live:
            self._live.stop()

    def show(self, metrics: Sequence[Line], events: Sequence[Line]) -> None:
        """What has come since the last call. Events of a moment stand before its step."""
        for line in sorted([*events, *metrics], key=lambda line: float(line["time"])):
            self._begun = float(line["time"]) if self._begun is None else self._begun
            if "event" in line:
                if text := event_text(line):
                    self._say(line, text, _STYLES.get(line["event"], "dim"))
            elif self._live:
                self._live.update(line)
            elif self._cadence.due(line):
                self._say(line, step_text(line, self._last_step), "")

    def _say(self, line: Line, text: str, style: str) -> None:
        elapsed = float(line["time"]) - (self._begun or 0.0)
        self._terminal.print(Text(f"{elapsed:8.2f} s  {text}", style))
        # A log is read while the run goes on, and a pipe is buffered otherwise.
        self._terminal.file.flush()

    def say(self, text: str) -> None:
        """A line of its own, without a time."""
        self._terminal.print(Text(text))
        self._terminal.file.flush()


class Live:
    """The progress line of a terminal."""

    def __init__(self, terminal: Terminal, last_step: int) -> None:
        self._progress = Progress(
            TextColumn("step {task.completed:.0f}/{task.total:.0f}"),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[status]}"),
            TimeElapsedColumn(),
            console=terminal,
        )
        self._task = self._progress.add_task("", total=last_step, status="starting")

    def start(self) -> None:
        self._progress.start()

    def stop(self) -> None:
        self._progress.stop()

    def update(self, line: Line) -> None:
        self._progress.update(self._task, completed=line["step"], status=measures(line))


class Cadence:
    """Which steps get a line in a log: some, evenly spread, the first of each world, the last, one after a silence."""

    def __init__(self, last_step: int) -> None:
        self._every = max(1, last_step // LINES_PER_RUN)
        self._last_step = last_step
        self._generation = 0
        self._shown_at = 0.0

    def due(self, line: Line) -> bool:
        step, at = int(line["step"]), float(line["time"])
        changed = line["generation"] != self._generation
        show = changed or step % self._every == 0 or step == self._last_step or at - self._shown_at >= SILENCE_S
        self._generation = line["generation"]
        if show:
            self._shown_at = at
        return show


def step_text(line: Line, last_step: int) -> str:
    width = len(str(last_step))
    return f"step {line['step']:>{width}}/{last_step}  {measures(line)}"


def measures(line: Line) -> str:
    """Loss, speed and world size of one metrics line."""
    loss = "skipped (not finite)" if line["loss"] is None else f"loss {line['loss']:.4f}"
    rate = line.get("tokens_per_s")
    speed = f"{rate:>9,.0f} tokens/s" if rate else " " * 18
    return f"{loss}  {speed}  world {line['world_size']}"


def event_text(event: Line) -> str | None:
    """One line for an event, None if it says nothing to a reader; one that is not known is shown with its fields."""
    own = {k: v for k, v in event.items() if k not in _COMMON}
    match event["event"]:
        case "worker_started":
            return f"worker {own.get('worker_id')} is ready (pid {own.get('pid')})"
        case "worker_lost":
            return f"worker {own.get('worker_id')} is lost: {own.get('cause')}"
        case "world_formed":
            size = own.get("world_size")
            return f"world {event['generation']}: {size} workers, {own.get('cause')}: {own.get('reason')}"
        case "step_rolled_forward":
            return f"step {event['step']} is committed by the survivors: {own.get('reason')}"
        case "step_rolled_back":
            return str(own.get("reason"))
        case "incident":
            return incident.describe(event)
        case "validation":
            return f"validation loss {own.get('loss'):.4f} after step {own.get('version')}"
        case "waiting":
            return f"waiting: {own.get('reason')}"
        case "exception":
            return f"exception: {own.get('text')}"
        case "checkpoint_started" | "memory":
            return None
        case "not_finite":
            return f"{own.get('worker_id')} met {own.get('text')}"
        case "checkpoint_committed":
            took = f" in {own['seconds']:.1f} s" if "seconds" in own else ""
            size = own.get("bytes", 0) / 2**20
            return f"checkpoint of step {own.get('checkpoint')} is complete: {size:.0f} MiB{took}"
        case "checkpoint_failed":
            return f"checkpoint of step {own.get('checkpoint')} failed: {own.get('error')}"
        case "storage_trouble":
            return f"storage fails, {own.get('worker_id')} tries again: {own.get('error')}"
        case "checkpoint_unreadable":
            what = f"cannot read the checkpoint of step {own.get('checkpoint')}"
            return f"{own.get('worker_id')} {what}: {own.get('error')}"
        case "checkpoint_found":
            return f"checkpoint of step {own.get('checkpoint')} is complete after all"
        case "checkpoint_damaged":
            return f"a checkpoint is damaged: {own.get('error')}"
        case "divergence":
            return f"silent corruption: {own.get('reason')}"
        case "checkpoint_distrusted":
            return f"the checkpoint of step {own.get('checkpoint')} is not used, as it may hold a wrong copy"
        case "emulated":
            return f"emulation: {emulation_text(own)}"
        case "rebalanced":
            return f"work moves: {own.get('reason')}"
        case "rebalance_measured":
            return f"since work has moved {own.get('reason')}"
        case "slow_link":
            return f"slow link: {own.get('reason')}"
        case "restored":
            return f"going back: {own.get('reason')}"
        case "stop_requested":
            return f"stop requested: {own.get('reason')}"
    said = ", ".join(f"{k} {v}" for k, v in own.items())
    return f"{str(event['event']).replace('_', ' ')}{': ' if said else ''}{said}"


def emulation_text(own: Line) -> str:
    """Which workers are made slow, by what, and when; from the fields of the event `emulated`."""
    slow = ", ".join(f"rank {rank} takes {float(factor):g} times as long" for rank, factor in own["slowdown"].items())
    first, last = own.get("from_step"), own.get("to_step")
    steps = "all steps" if first is None and last is None else f"steps {first or 1} to {last or 'the last'}"
    return f"{slow} on purpose in {steps}"


def summary_text(record: Line, metrics: Sequence[Line], events: Sequence[Line], url: str) -> str:
    """What is left to say when a run is over: status, steps, losses, incidents, and where everything lies.

    Args:
        record: run.json.
        metrics: one line per committed step, by step.
    """
    status = record["status"] + (f": {record['error']}" if record.get("error") else "")
    lines = [f"{record['name']} {status}"]
    if metrics:
        seconds = metrics[-1]["time"] - metrics[0]["time"]
        lines.append(f"  steps       {len(metrics)} (last {metrics[-1]['step']}) in {seconds:.1f} s")
        losses = [m["loss"] for m in metrics if m["loss"] is not None]
        if losses:
            lines.append(f"  loss        {losses[0]:.4f} at first, {losses[-1]:.4f} at last")
    lines += [f"  validation  {e['loss']:.4f} after step {e['version']}" for e in _last(events, "validation")]
    lines += [f"  emulation   {emulation_text(e)}" for e in _last(events, "emulated")]
    suffered = incident.unplanned(events)
    lines.append(f"  incidents   {len(suffered) or 'none'}")
    lines += [f"              step {e['step']}: {incident.describe(e)}" for e in suffered]
    lines.append(f"  directory   {url}")
    return "\n".join(lines)


def _last(events: Sequence[Line], name: str) -> list[Line]:
    return [e for e in events if e.get("event") == name][-1:]
