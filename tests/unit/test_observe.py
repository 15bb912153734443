"""What is shown of a run, from its records alone."""

import io
import re
from typing import Any

import pytest

from evenkeel.control.messages import Log, Metrics
from evenkeel.core.vote import SLOTS, Slot, Vote
from evenkeel.observe import incident
from evenkeel.observe.console import Cadence, Console, event_text, measures, step_text, summary_text
from evenkeel.observe.events import MetricsClock, event_record


def vote(step: int, generation: int = 1, **slots: float) -> Vote:
    values = [0.0] * SLOTS
    for slot, value in {"ONES": 4, "STEP": 4 * step, "TOKENS": 100, "LOSS": 250, "GRAD_SQUARES": 400, **slots}.items():
        values[Slot[slot]] = value
    return Vote(generation, step, tuple(values))


def line(step: int, time: float, generation: int = 1, world_size: int = 4, loss: float | None = 2.5) -> dict[str, Any]:
    own = {"loss": loss, "tokens_per_s": 4321.0, "world_size": world_size}
    return {"step": step, "time": time, "generation": generation, **own}


INCIDENT = {
    "time": 5.0, "event": "incident", "generation": 2, "step": 46, "cause": "worker lost", "lost": ["w0001"],
    "phases": {"detect": 0.0124, "abort": 0.0031, "settle": 0.001, "plan": 0.0008, "regroup": 0.06, "reshard": 0.02,
               "first_step": 1.25},
    "total": 1.3473,
}  # fmt: skip


def test_a_metrics_line_has_the_documented_fields() -> None:
    clock = MetricsClock(global_batch=16)
    first = clock.record(Metrics(vote(1), 100.0, 4), 0.1, now=7e9)
    second = clock.record(Metrics(vote(2, generation=3), 100.5, 3), 0.2, now=7e9)
    assert (first["step_s"], first["tokens_per_s"]) == (None, None)
    assert second == {
        "step": 2, "loss": 2.5, "grad_norm": 0.2, "lr": 0.2, "tokens": 100, "step_s": 0.5, "tokens_per_s": 200.0,
        "generation": 3, "world_size": 3, "samples": [16, 32], "time": 100.5, "checkpoint_failures": 0,
    }  # fmt: skip


def test_a_step_that_only_a_decision_commits_is_timed_when_it_is_written() -> None:
    clock = MetricsClock(16)
    clock.record(Metrics(vote(1), 100.0, 4), 0.1, now=100.1)
    settled = clock.record(Metrics(vote(2), None, 4), 0.1, now=101.0)
    assert (settled["time"], settled["step_s"]) == (101.0, 1.0)


def test_a_skipped_step_has_no_loss() -> None:
    record = MetricsClock(16).record(Metrics(vote(1, NONFINITE=1.0), 1.0, 4), 0.1, now=7e9)
    assert (record["loss"], record["grad_norm"]) == (None, None)
    assert "skipped (not finite)" in measures(record)


def test_an_event_line_has_the_common_fields_and_its_own() -> None:
    record = event_record(Log("worker_lost", 3, 17, {"worker_id": "w1", "cause": "died"}), 9.5)
    expected = {"time": 9.5, "event": "worker_lost", "generation": 3, "step": 17, "worker_id": "w1", "cause": "died"}
    assert record == expected
    with pytest.raises(ValueError, match="has a field step of its own"):
        event_record(Log("x", 1, 1, {"step": 2}), 0.0)


def test_an_emulation_is_called_one() -> None:
    event = {"time": 1.0, "event": "emulated", "generation": 0, "step": 0, "slowdown": {"1": 2.0, "3": 6.4}}
    slow = "rank 1 takes 2 times as long, rank 3 takes 6.4 times as long on purpose in"
    assert event_text({**event, "from_step": None, "to_step": None}) == f"emulation: {slow} all steps"
    assert event_text({**event, "from_step": 5, "to_step": 7}) == f"emulation: {slow} steps 5 to 7"
    assert f"emulation   {slow} steps 5 to the last" in summary_text(
        {"name": "a", "status": "finished"}, [], [{**event, "from_step": 5, "to_step": None}], "here"
    )


def test_an_incident_is_one_line_with_every_phase_in_milliseconds() -> None:
    assert incident.describe(INCIDENT) == (
        "worker lost (w0001): healed in 1,347 ms (detect 12, abort 3.1, settle 1.0, plan 0.8, regroup 60, reshard 20, "
        "first step 1,250)"
    )
    assert incident.describe({"cause": "pause", "phases": {"regroup": 0.1}}).startswith("pause: done in 100 ms")
    waited = incident.describe(INCIDENT | {"waited": 7.5, "earlier": 0.0})
    assert waited == incident.describe(INCIDENT)[:-1] + ", waited for workers 7,500)"
    assert tuple(incident.phase_times({})) == incident.PHASES


@pytest.mark.parametrize(("seconds", "text"), [(0.0, "0.0"), (0.00994, "9.9"), (0.00996, "10"), (12.3456, "12,346")])
def test_milliseconds(seconds: float, text: str) -> None:
    assert incident.milliseconds(seconds) == text


def test_a_log_shows_some_steps_all_changes_and_the_last() -> None:
    cadence = Cadence(90)
    steps = [line(s, s / 10, generation=1 if s < 47 else 2) for s in range(1, 91)]
    shown = [m["step"] for m in steps if cadence.due(m)]
    assert shown == [1, *range(3, 46, 3), 47, *range(48, 91, 3)]


def test_a_slow_run_is_never_silent_for_long() -> None:
    cadence = Cadence(1_000_000)
    shown = [s for s in range(1, 20) if cadence.due(line(s, s * 10.0))]
    assert shown == [1, 4, 7, 10, 13, 16, 19]


def test_plain_lines_come_in_the_order_of_their_times() -> None:
    out = io.StringIO()
    formed = {"time": 0.0, "event": "world_formed", "generation": 1, "step": 0, "world_size": 4, "cause": "start"}
    with Console(90, out) as console:
        console.show([line(1, 1.0), line(2, 2.0), line(3, 3.0)], [{**formed, "reason": "4 of 4 [workers]"}])
        console.show([line(46, 5.0, generation=2)], [INCIDENT])
    assert "\x1b" not in out.getvalue()
    assert out.getvalue().splitlines() == [
        "    0.00 s  world 1: 4 workers, start: 4 of 4 [workers]",
        "    1.00 s  step  1/90  loss 2.5000      4,321 tokens/s  world 4",
        "    3.00 s  step  3/90  loss 2.5000      4,321 tokens/s  world 4",
        f"    5.00 s  {incident.describe(INCIDENT)}",
        "    5.00 s  step 46/90  loss 2.5000      4,321 tokens/s  world 4",
    ]


class Tty(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_gets_a_progress_line_and_the_events_above_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "100")
    out = Tty()
    with Console(90, out) as console:
        console.show([line(45, 4.0)], [])
        console.show([line(46, 5.0)], [INCIDENT])
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", out.getvalue())
    assert "worker lost (w0001): healed in 1,347 ms" in plain
    assert "step 46/90" in plain
    assert "4,321 tokens/s" in plain


@pytest.mark.parametrize(
    ("event", "fields", "text"),
    [
        ("worker_started", {"worker_id": "w1", "pid": 7}, "worker w1 is ready (pid 7)"),
        ("worker_lost", {"worker_id": "w1", "cause": "died"}, "worker w1 is lost: died"),
        ("step_rolled_forward", {"reason": "w2 saw"}, "step 8 is committed by the survivors: w2 saw"),
        ("step_rolled_back", {"reason": "nobody saw"}, "nobody saw"),
        ("validation", {"loss": 1.23456, "version": 8}, "validation loss 1.2346 after step 8"),
        ("waiting", {"reason": "1 more worker"}, "waiting: 1 more worker"),
        ("exception", {"text": "w1: boom"}, "exception: w1: boom"),
        ("stop_requested", {"reason": "SIGTERM"}, "stop requested: SIGTERM"),
        ("start_failed", {"count": 1, "error": "no node"}, "start failed: count 1, error no node"),
        ("checkpoint_started", {"checkpoint": 8}, None),
        ("memory", {"worker_id": "w0001", "peak": 1}, None),
        ("not_finite", {"worker_id": "w0001", "text": "the loss"}, "w0001 met the loss"),
        (
            "checkpoint_committed",
            {"checkpoint": 8, "bytes": 3 << 20, "seconds": 0.25},
            "checkpoint of step 8 is complete: 3 MiB in 0.2 s",
        ),
        ("checkpoint_failed", {"checkpoint": 8, "error": "w1: 403"}, "checkpoint of step 8 failed: w1: 403"),
        (
            "checkpoint_unreadable",
            {"worker_id": "w0001", "checkpoint": 8, "error": "x: missing"},
            "w0001 cannot read the checkpoint of step 8: x: missing",
        ),
        ("checkpoint_found", {"checkpoint": 8}, "checkpoint of step 8 is complete after all"),
        ("checkpoint_damaged", {"error": "x: missing"}, "a checkpoint is damaged: x: missing"),
        ("restored", {"base": 4, "reason": "back to 4"}, "going back: back to 4"),
        ("something_new", {}, "something new"),
    ],
)
def test_events_in_words(event: str, fields: dict[str, Any], text: str | None) -> None:
    assert event_text({"time": 0.0, "event": event, "generation": 1, "step": 8, **fields}) == text


def test_step_numbers_line_up() -> None:
    assert step_text(line(7, 0.0), 1000).startswith("step    7/1000  loss")


def test_the_summary_says_what_came_of_it() -> None:
    metrics = [line(1, 10.0, loss=5.5), line(2, 11.0, loss=None), line(3, 14.0, loss=2.25)]
    validation: dict[str, Any] = {"event": "validation", "loss": 3.0, "version": 3}
    paused: dict[str, Any] = {"event": "incident", "cause": "pause"}
    events = [INCIDENT, paused, {**validation, "loss": 9.0}, validation]
    text = summary_text({"name": "r", "status": "finished", "error": ""}, metrics, events, "/runs/r")
    assert text.splitlines() == [
        "r finished",
        "  steps       3 (last 3) in 4.0 s",
        "  loss        5.5000 at first, 2.2500 at last",
        "  validation  3.0000 after step 3",
        "  incidents   1",
        f"              step 46: {incident.describe(INCIDENT)}",
        "  directory   /runs/r",
    ]


def test_the_summary_of_a_run_that_never_stepped() -> None:
    text = summary_text({"name": "r", "status": "failed", "error": "no worker"}, [], [], "/runs/r")
    assert text.splitlines() == ["r failed: no worker", "  incidents   none", "  directory   /runs/r"]
