"""The records of metrics.jsonl and events.jsonl, from the controller's commands."""

from dataclasses import dataclass
from typing import Any

from evenkeel.control.messages import Log, Metrics

Record = dict[str, Any]


@dataclass
class MetricsClock:
    """Makes the metrics lines of one run; remembers when the step before was committed.

    Attributes:
        global_batch: samples per step.
        last_commit_s: unix seconds of the last committed step, None before the first.
        checkpoint_failures: checkpoints so far that could not be written, as many as there are such events.
    """

    global_batch: int
    last_commit_s: float | None = None
    checkpoint_failures: int = 0

    def record(self, metrics: Metrics, learning_rate: float, now: float) -> Record:
        """One line: `step_s` is the time since the previous commit, of this run's first step unknown (None).

        `loss` is the mean per token and `grad_norm` the norm of the mean gradient, both None in a skipped step.
        `samples` is half-open and grows over epochs. `checkpoint_failures` counts all `checkpoint_failed` of the run so
        far, also of earlier lives of the controller; how many of them were in a row, those events say (`in_a_row`).

        Args:
            now: unix seconds, for a step whose commit nobody reported: a decision commits it now.
        """
        vote, before = metrics.vote, self.last_commit_s
        committed_at = now if metrics.committed_at is None else metrics.committed_at
        self.last_commit_s = committed_at
        step_s = None if before is None else committed_at - before
        return {
            "step": vote.step,
            "loss": vote.loss,
            "grad_norm": vote.grad_norm,
            "lr": learning_rate,
            "tokens": vote.tokens,
            "step_s": step_s,
            "tokens_per_s": vote.tokens / step_s if step_s else None,
            "generation": vote.generation,
            "world_size": metrics.world_size,
            "samples": [(vote.step - 1) * self.global_batch, vote.step * self.global_batch],
            "time": committed_at,
            "checkpoint_failures": self.checkpoint_failures,
        }


def event_record(log: Log, time: float) -> Record:
    """One line of events.jsonl; an event's own fields stand beside the common ones.

    Raises:
        ValueError: if a field of its own has the name of a common one.
    """
    common = {"time": time, "event": log.event, "generation": log.generation, "step": log.step}
    if clash := common.keys() & log.fields.keys():
        raise ValueError(f"event {log.event} has a field {min(clash)} of its own")
    return {**common, **log.fields}
