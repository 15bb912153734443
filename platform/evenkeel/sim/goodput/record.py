"""What a run decided, in words that do not depend on names or times; so that a real run's journal can be compared."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from evenkeel.control import messages as m
from evenkeel.control.incident import PLANNED
from evenkeel.core.ids import INITIAL
from evenkeel.core.layout import Layout

SOURCES = ("mirror", "checkpoint", "beginning")
"""What a run can go back to."""

FROM_WORKERS = (m.Reported, m.Answered, m.Settled, m.Joined, m.Located, m.PartWritten, m.StillWriting)


@dataclass
class Record:
    """What is counted and kept of a run."""

    events: int = 0
    messages: int = 0
    incidents: int = 0
    restores: Counter[str] = field(default_factory=lambda: Counter(dict.fromkeys(SOURCES, 0)))
    decisions: list[tuple[float, str]] = field(default_factory=list)

    def heard(self, events: Sequence[m.Event]) -> None:
        """The controller hears these, which are all of one kind."""
        self.events += len(events)
        if events and isinstance(events[0], FROM_WORKERS):
            self.messages += len(events)

    def entry(self, now: float, entry: m.Entry) -> None:
        """The controller wrote this down."""
        what = describe(entry)
        if what:
            self.decisions.append((now, what))
        if isinstance(entry, m.Restored):
            self.restores[source_of(entry)] += 1

    def log(self, line: m.Log) -> None:
        """A line of events.jsonl."""
        if line.event == "incident" and line.fields["cause"] not in PLANNED:
            self.incidents += 1


def describe(entry: m.Entry) -> str:
    """One decision; "" for what is none."""
    match entry:
        case m.WorldOpened(world):
            saved = ", read from its checkpoint" if world.saved else ""
            return f"world of {shape(world.layout)} from step {world.base.step}{saved}: {world.cause}"
        case m.StepSettled(decision):
            return f"step {decision.base.step} settled{_open_step(entry)}"
        case m.Restored(base):
            return f"back to step {base.step}, to the {source_of(entry)}"
        case m.RunEnded(status, error):
            return f"{status}: {error}" if error else status
        case _:
            return ""


def _open_step(entry: m.StepSettled) -> str:
    """What becomes of the step that was open, as events.jsonl tells it (control/repair.py)."""
    base, generation = entry.decision.base, entry.decision.generation
    if entry.decision.vote is not None and any(answer.prepared == base for answer in entry.evidence.values()):
        return ", rolled forward"
    positions = (answer.position for answer in entry.evidence.values())
    redone = any(at.generation == generation and at.step > base.step for at in positions)
    return f", step {base.step + 1} redone" if redone else ""


def shape(layout: Layout) -> str:
    """Such as "2 x 4 stages": pipelines by their depth, with the TP degree if that is more than 1."""
    depths = Counter(len(pipeline.stages) for pipeline in layout.pipelines)
    tensor = f" of {layout.tensor}" if layout.tensor > 1 else ""
    return " + ".join(f"{n} x {depth} stages{tensor}" for depth, n in sorted(depths.items(), reverse=True))


def source_of(entry: m.Restored) -> str:
    """One of SOURCES, as the controller gave its reason (control/forming.py)."""
    if "back to the mirrors of" in entry.reason:
        return "mirror"
    return "beginning" if entry.base == INITIAL else "checkpoint"
