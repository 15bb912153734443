"""How long a run takes to heal: from the signal to the next committed step, read from its run directory."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from bench.process import BenchError
from bench.sides import Side
from bench.work import WARM_UP, Steps, Work

FAULT_STEP = 32
"""Late enough for the spare to stand by, and for a median of undisturbed steps."""
STEPS = 44


@dataclass(frozen=True, slots=True)
class Case:
    """One kind of loss: what is sent to rank 1 in its backward pass, how many spares there are, who goes on.

    Attributes:
        data: pipelines of two stages. With one of them nobody else has what is lost, but for the mirrors.
    """

    name: str
    kind: str
    spares: int
    after: int
    data: int = 2
    mirror_every: int = 0

    @property
    def workers(self) -> int:
        return 2 * self.data

    def work(self) -> Work:
        fault = {"step": FAULT_STEP, "phase": "backward", "target": "rank:1", "kind": self.kind}
        return Work(
            steps=STEPS, data=self.data, pipeline=2, spares=self.spares, fewest=max(2, self.workers - 1),
            mirror_every=self.mirror_every, faults=(fault,),
        )  # fmt: skip


CASES = (
    Case("spare", "kill", 1, 4),
    Case("shrink", "kill", 0, 3),
    Case("hang", "stop", 1, 4),
    Case("mirror", "kill", 1, 2, data=1, mirror_every=5),
)


@dataclass(frozen=True, slots=True)
class Healed:
    """Seconds from the signal to the next commit, and of an undisturbed step before it."""

    gap_s: float
    step_s: float

    @property
    def less_one_step_s(self) -> float:
        return self.gap_s - self.step_s


def healed(steps: Steps) -> Healed:
    """The instant of the signal is that of the marker which the target leaves just before it.

    Raises:
        BenchError: if there was no signal, or no step after it.
    """
    assert steps.run is not None
    markers = sorted((steps.run / "faults").glob("*"))
    if not markers:
        raise BenchError("the configured fault did not happen")
    at = markers[0].stat().st_mtime
    after = [end for end in steps.ends.values() if end > at]
    if not after:
        raise BenchError("no step was committed after the fault")
    before = sorted(step for step, end in steps.ends.items() if end <= at and step > WARM_UP)
    if len(before) < 2:
        raise BenchError("the fault came before any step that could be measured")
    return Healed(min(after) - at, median(steps.ends[s] - steps.ends[s - 1] for s in before))


def check_healed(case: Case, steps: Steps) -> None:
    """Raises BenchError unless one world followed on the first, of as many workers as the case is about."""
    assert steps.run is not None
    healed(steps)
    size = {line["generation"]: line["world_size"] for line in map(json.loads, _text(steps.run).splitlines())}
    generations = sorted(size)
    if len(generations) < 2 or size[generations[0]] != case.workers or size[generations[1]] != case.after:
        expected = f"{case.workers}, then {case.after}"
        raise BenchError(f"{case.name}: world sizes by generation are {size}; expected {expected}")
    if generations[1] != generations[0] + 1:
        raise BenchError(f"{case.name}: it took {generations[1] - generations[0]} generations to heal")
    back = any("back to the mirrors" in line.get("reason", "") for line in map(json.loads, _events(steps.run)))
    if back != bool(case.mirror_every):
        raise BenchError(f"{case.name}: it went back to mirrors: {back}")


def checks(cases: Mapping[str, Case], side: Side, steps: Steps) -> None:
    check_healed(cases[side.name], steps)


def _events(run: Path) -> list[str]:
    return [line for line in (run / "events.jsonl").read_text().splitlines() if '"restored"' in line]


def _text(run: Path) -> str:
    return (run / "metrics.jsonl").read_text()
