"""One disturbance and its repair, timed in phases from the times of the controller's events."""

from dataclasses import dataclass, field
from typing import Any

from evenkeel.core.ids import WorkerId


@dataclass
class Incident:
    """Seconds of each phase, filled in as the repair goes on. All times are the controller's `now`.

    detect is from the last sign of life to the decision to break the world; plan is what lies between the last
    acknowledged decision and the first member's start of regrouping: planning, writing down, telling.
    """

    cause: str
    begun_at: float
    detect_s: float
    lost: list[WorkerId] = field(default_factory=list)
    unparked: set[WorkerId] = field(default_factory=set)
    """Of the lost those that were killed only because they did not answer in time."""
    faults: list[str] = field(default_factory=list)
    answered_at: float = 0.0
    settled_at: float = 0.0
    joined_at: float = 0.0
    regroup_s: float = 0.0
    reshard_s: float = 0.0
    attempts: int = 0
    rolled_forward: bool = False

    @property
    def planned(self) -> bool:
        """Asked for rather than suffered: a pause, a stop, or a run that is submitted again."""
        return self.cause in ("pause", "stop", "resumed")

    def describe(self) -> str:
        """One line for an error message."""
        return f"last: {self.cause}" + (f" ({', '.join(self.lost)})" if self.lost else "")

    def fields(self, now: float) -> dict[str, Any]:
        """The event line's own fields, when the first step after it was committed at `now`."""
        forming = max(0.0, self.joined_at - self.settled_at)
        plan = max(0.0, forming - self.regroup_s - self.reshard_s)
        phases = {
            "detect": self.detect_s,
            "abort": self.answered_at - self.begun_at,
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
            "total": round(self.detect_s + now - self.begun_at, 6),
        }
