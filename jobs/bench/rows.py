"""What a benchmark says: rows with a bound to keep, and the one JSON object that they end up in."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from statistics import median

from bench.machine import machine, versions
from bench.stats import INTERVAL_RUNS, Better, bootstrap_median, meets, ratio_meets

CLOSE, FAR = INTERVAL_RUNS, 5
"""Pairs where a ratio near 1 is decided, and elsewhere."""


@dataclass(frozen=True, slots=True)
class Bound:
    """What a row must keep to, and what it aims at.

    Attributes:
        unit: "ratio" for paired runs (ours / theirs, as `what` says), else a unit of the value, such as "s".
        min_runs: with fewer measurements than this nothing holds.
        what: what is measured, in words, for the table.
    """

    name: str
    unit: str
    must: float
    goal: float
    better: Better
    min_runs: int
    what: str


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the result, as it stands in the JSON object."""

    name: str
    value: float | None
    unit: str
    must: float
    goal: float
    better: Better
    holds: bool
    runs: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Result:
    """The rows of a benchmark, and what is printed beside.

    Attributes:
        notes: by row, such as CPU seconds per step or why it could not be measured.
        what: by row, what is measured.
    """

    benchmark: str
    rows: tuple[Row, ...]
    notes: dict[str, str] = field(default_factory=dict)
    what: dict[str, str] = field(default_factory=dict)

    def to_json(self) -> dict[str, object]:
        """Exactly the keys that tools rely on (docs/benchmarks.md)."""
        return {
            "benchmark": self.benchmark,
            "rows": [asdict(row) for row in self.rows],
            "machine": machine(),
            "versions": versions(),
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
        }


def row(bound: Bound, runs: Sequence[float]) -> Row:
    """The median of the runs and whether it keeps to `must`; without a run the value is None, and nothing holds."""
    value = median(runs) if runs else None
    holds = False
    if value is not None and len(runs) >= bound.min_runs:
        ratio = bound.unit == "ratio"
        holds = ratio_meets(runs, bound.better, bound.must) if ratio else meets(value, bound.better, bound.must)
    return Row(bound.name, value, bound.unit, bound.must, bound.goal, bound.better, holds, tuple(runs))


def complete(bound: Bound, values: Sequence[float], rounds: int) -> Row:
    """A row over every round; if one of them has no value, the runs stand there but the value could not be measured."""
    made = row(bound, values)
    return made if len(values) == rounds else replace(made, value=None, holds=False)


@dataclass(frozen=True, slots=True)
class Found:
    """What was measured of one row, in how many rounds; `notes` are lines for the table, of which some may be empty."""

    bound: Bound
    values: Sequence[float]
    rounds: int
    notes: Sequence[str]


def results(name: str, found: Sequence[Found]) -> Result:
    return Result(
        name,
        tuple(complete(f.bound, f.values, f.rounds) for f in found),
        {f.bound.name: "\n".join(filter(None, f.notes)) for f in found if any(f.notes)},
        {f.bound.name: f.bound.what for f in found},
    )


def interval_text(values: Sequence[float]) -> str:
    """For the reader of a ratio; nothing for a single pair."""
    if len(values) < 2:
        return ""
    interval = bootstrap_median(values)
    return f"95 % of the median: {interval.low:.3f} to {interval.high:.3f} ({len(values)} pairs)"
