"""One disturbance and its repair, timed in phases from the times of the controller's events."""

from dataclasses import dataclass, field
from typing import Any

from evenkeel.core.ids import WorkerId

PLANNED = ("pause", "rebalance", "stop", "resumed")
"""Causes that are asked for rather than suffered; the last is a run that is submitted again."""


@dataclass
class Incident:
    """Seconds of each phase, filled in as the repair goes on. All times are the controller's `now`.

    detect is from the last sign of life to the decision to break the world; plan is what lies between the last
    acknowledged decision and the first member's start of regrouping: planning, writing down, telling. Where another
    fault comes during the repair, the phases are those of the last attempt. Beside them are `waited`, in which there
    were too few workers for any world, and `earlier`, from the first break to the beginning of the last attempt.
    """

    cause: str
    begun_at: float
    detect_s: float
    lost: dict[WorkerId, str] = field(default_factory=dict)
    """With the cause of each one's death."""
    blameless: set[WorkerId] = field(default_factory=set)
    """Of the lost those whose death says nothing of what they computed: their node is gone, or they did not answer, as
    one does not whose node is."""
    faults: list[str] = field(default_factory=list)
    broken: str = ""
    """What the first worker said whose collective broke."""
    aborted_at: float = 0.0
    answered_at: float = 0.0
    settled_at: float = 0.0
    formed_at: float = 0.0
    joined_at: float = 0.0
    regroup_s: float = 0.0
    reshard_s: float = 0.0
    attempts: int = 0
    rolled_forward: bool = False

    @property
    def planned(self) -> bool:
        """Asked for rather than suffered."""
        return self.cause in PLANNED

    def __post_init__(self) -> None:
        self.aborted_at = self.begun_at

    def abort(self, now: float) -> None:
        """An attempt at the repair begins: all are told to stop."""
        self.aborted_at = now
        self.regroup_s = self.reshard_s = 0.0

    def formed(self, now: float) -> None:
        """There is a plan for a world."""
        self.attempts += 1
        self.formed_at = now

    def joined(self, regroup_s: float, reshard_s: float) -> None:
        """A member is ready; the slowest counts."""
        if regroup_s > self.regroup_s:
            self.regroup_s = regroup_s
        if reshard_s > self.reshard_s:
            self.reshard_s = reshard_s

    def describe(self) -> str:
        """One line for an error message."""
        who = ", ".join(f"{worker}: {cause}" for worker, cause in self.lost.items())
        why = who or self.broken
        return f"last: {self.cause}" + (f" ({why})" if why else "")

    def fields(self, now: float) -> dict[str, Any]:
        """The event line's own fields, when the first step after it was committed at `now`."""
        forming = max(0.0, self.joined_at - self.formed_at)
        plan = max(0.0, forming - self.regroup_s - self.reshard_s)
        phases = {
            "detect": self.detect_s,
            "abort": self.answered_at - self.aborted_at,
            "settle": self.settled_at - self.answered_at,
            "plan": plan,
            "regroup": self.regroup_s,
            "reshard": self.reshard_s,
            "first_step": now - self.joined_at,
        }
        return {
            "cause": self.cause,
            "lost": list(self.lost),
            "faults": list(self.faults),
            "attempts": self.attempts,
            "rolled_forward": self.rolled_forward,
            "phases": {k: round(v, 6) for k, v in phases.items()},
            "waited": round(self.formed_at - self.settled_at, 6),
            "earlier": round(self.aborted_at - self.begun_at, 6),
            "total": round(self.detect_s + now - self.begun_at, 6),
        }
