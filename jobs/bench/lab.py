"""Runs contenders in turn, so that a change of the machine's mood meets all of them alike."""

import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import TypeVar

from bench.process import BenchError, wait_quiet
from bench.sides import Side
from bench.work import WARM_UP, Steps, check_same_work

QUIET_LIMIT_S = 20.0
"""Longest wait, before each round, for others on this machine to become quiet."""
ATTEMPTS = 2

Round = dict[str, Steps]
T = TypeVar("T")


def say(text: str) -> None:
    """Progress; not on stdout, whose last line may be JSON."""
    print(text, file=sys.stderr, flush=True)


@dataclass
class Lab:
    """Where runs take place.

    Attributes:
        failures: by contender, why it was given up.
    """

    folder: Path = field(default_factory=lambda: Path(tempfile.mkdtemp(prefix="evenkeel-bench-")))
    failures: dict[str, str] = field(default_factory=dict)
    _runs: int = 0

    def rounds(
        self,
        sides: Sequence[Side],
        count: int,
        check: Callable[[Side, Steps], None] = lambda side, steps: None,
    ) -> list[Round]:
        """Runs every side once a round, forwards and backwards in turn (A B B A).

        The losses of the first side, ours, are compared with those of the others: the same work has the same losses. A
        side that fails twice in a row, or did other work, is given up, and stands in `failures`.

        Args:
            check: raises BenchError for a run that is no measurement of what it should be.
        """
        say(f"{count} rounds of {', '.join(s.name for s in sides)}: about {count * _about_s(sides) / 60:.0f} minutes")
        done: list[Round] = []
        for number in range(count):
            wait_quiet(QUIET_LIMIT_S)
            order = sides if number % 2 == 0 else sides[::-1]
            found = {s.name: steps for s in order if (steps := self._measure(s, check)) is not None}
            self._compare(sides[0].name, found)
            done.append(found)
            say(f"round {number + 1}: " + ", ".join(f"{name} {_short(steps)}" for name, steps in found.items()))
        return done

    def repeat(self, name: str, count: int, run: Callable[[Path, int], T]) -> list[T]:
        """What is measured in another way than by training: so many times, as long as it does not fail twice in a row.

        Args:
            run: is given an empty folder and the number of the round, from 0; raises BenchError.
        """
        say(f"{count} rounds of {name}")
        done: list[T] = []
        for number in range(count):
            wait_quiet(QUIET_LIMIT_S)
            found = self._try(name, lambda folder, number=number: run(folder, number))
            if found is None:
                break
            done.append(found)
            say(f"round {number + 1}: {found}")
        return done

    def reasons(self, names: Sequence[str]) -> list[str]:
        """Why those of them were given up that were."""
        return [f"{name}: {self.failures[name]}" for name in names if name in self.failures]

    def _measure(self, side: Side, check: Callable[[Side, Steps], None]) -> Steps | None:
        def run(folder: Path) -> Steps:
            steps = side.run(folder)
            check(side, steps)
            return steps

        return self._try(side.name, run)

    def _try(self, name: str, run: Callable[[Path], T]) -> T | None:
        """What `run` gives; None if it has been given up, which stands in `failures`."""
        if name in self.failures:
            return None
        for attempt in range(1, ATTEMPTS + 1):
            self._runs += 1
            folder = self.folder / f"{self._runs:03d}"
            folder.mkdir()
            try:
                return run(folder)
            except BenchError as error:
                say(f"{name}: attempt {attempt} gave no measurement: {error}")
                reason = str(error)
        self.failures[name] = reason
        return None

    def _compare(self, ours: str, found: Round) -> None:
        for name in [n for n in found if n != ours and ours in found]:
            try:
                check_same_work(found[ours], found[name], name)
            except BenchError as error:
                say(f"{name}: {error}")
                self.failures[name] = str(error)
                del found[name]


def ratios(rounds: Sequence[Round], top: str, bottom: str, value: Callable[[Steps], float]) -> list[float]:
    """Of each round that has both: the value of `top` over the value of `bottom`."""
    return [value(r[top]) / value(r[bottom]) for r in rounds if top in r and bottom in r]


def beside(rounds: Sequence[Round], names: Sequence[str]) -> str:
    """Medians of step time, CPU time and others' load, for the reader of a ratio."""
    parts = []
    for name in names:
        runs = [r[name] for r in rounds if name in r]
        if not runs:
            continue
        text = f"{name}: step {1000 * median(s.step_s for s in runs):.0f} ms"
        if cpu := [s.cpu_s for s in runs if s.cpu_s is not None]:
            text += f", CPU {median(cpu):.3f} s/step"
        if others := [s.foreign_cores for s in runs if s.foreign_cores is not None]:
            text += f", others {max(0.0, median(others)):.2f} cores"
        parts.append(text)
    return "\n".join(parts)


def _about_s(sides: Sequence[Side]) -> float:
    return sum(side.about_s for side in sides)


def _short(steps: Steps) -> str:
    since = WARM_UP if steps.last > WARM_UP else 1
    step_s = (steps.ends[steps.last] - steps.ends[since]) / max(1, steps.last - since)
    return f"first step {steps.first_step_s:.1f} s, then {1000 * step_s:.0f} ms"
