"""An incident's phases in words. The times come from the controller, in the event's field `phases`, in seconds."""

from collections.abc import Mapping, Sequence
from typing import Any

from evenkeel.control.incident import PLANNED

PHASES = ("detect", "abort", "settle", "plan", "regroup", "reshard", "first_step")
"""detect: last sign of life to decision. abort: to everybody's answer. settle: to everybody's acknowledgement of what
becomes of the open step. plan: layout, journal, telling. regroup: process groups. reshard: missing slices.
first_step: to the next commit. Where another fault came during the repair, those of the last attempt."""

BESIDE = {"earlier": "earlier attempts", "waited": "waited for workers"}
"""Fields beside the phases, which with them add up to the total, and what they are called."""


def phase_times(incident: Mapping[str, Any]) -> dict[str, float]:
    """Seconds of every phase, in order; 0 for one that did not occur."""
    phases = incident.get("phases", {})
    return {name: float(phases.get(name, 0.0)) for name in PHASES}


def total_s(incident: Mapping[str, Any]) -> float:
    """Seconds from the last sign of life to the first commit after the repair."""
    return float(incident.get("total", sum(phase_times(incident).values())))


def describe(incident: Mapping[str, Any]) -> str:
    """One line: what happened, how long it took, and where the time went, in milliseconds."""
    what = incident.get("cause", "incident")
    if lost := incident.get("lost"):
        what += f" ({', '.join(lost)})"
    spent = {name.replace("_", " "): s for name, s in phase_times(incident).items()}
    spent |= {name: incident[field] for field, name in BESIDE.items() if incident.get(field)}
    times = ", ".join(f"{name} {milliseconds(s)}" for name, s in spent.items())
    verb = "done" if incident.get("cause") in PLANNED else "healed"
    return f"{what}: {verb} in {milliseconds(total_s(incident))} ms ({times})"


def milliseconds(seconds: float) -> str:
    """Rounded to whole milliseconds; below 10 with one digit after the point."""
    value = seconds * 1000
    return f"{value:.1f}" if abs(value) < 9.95 else f"{value:,.0f}"


def unplanned(events: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The incidents among the events that were suffered rather than asked for."""
    return [e for e in events if e.get("event") == "incident" and e.get("cause") not in PLANNED]
