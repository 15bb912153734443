"""Which metrics lines led to where a run is: the files also keep those of lines that were given up."""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

Record = dict[str, Any]

Base = tuple[int, int]
"""Step and generation of the state that the world of a generation began from."""


def current(lines: Sequence[Record], base_of: Callable[[int], Base | None]) -> list[Record]:
    """The lines of the steps that led to the last one, by step.

    Each generation goes on from a state of an earlier one, maybe of a line that had been given up (--resume 10, and
    later --resume 30), so that to take the last line of each step is not enough.

    Args:
        lines: as they were written, each with its step.
        base_of: None where it is not known, as of worlds that an earlier evenkeel wrote; asked only if the run ever
            went back.
    """
    last = _last_of_each(lines)
    if len(last) == len(lines) or not all(type(line.get("generation")) is int for line in lines):
        return last
    by_generation: dict[int, list[Record]] = defaultdict(list)
    for line in lines:
        by_generation[line["generation"]].append(line)
    kept: list[Record] = []
    generation, until = lines[-1]["generation"], lines[-1]["step"]
    while (base := base_of(generation)) is not None:
        own = [line for line in by_generation[generation] if base[0] < line["step"] <= until]
        kept = _last_of_each(own) + kept
        if not 0 < base[1] < generation:
            return kept
        until, generation = base
    earlier = [line for line in lines if line["generation"] <= generation and line["step"] <= until]
    return _last_of_each(earlier) + kept


def base_in(world: Mapping[str, Any] | None) -> Base | None:
    """What worlds/NNNNNN.json says."""
    step, generation = (world or {}).get("base_step"), (world or {}).get("base_generation")
    return (step, generation) if type(step) is int and type(generation) is int else None


def _last_of_each(lines: Sequence[Record]) -> list[Record]:
    """By step: a line takes back those of its step and of later ones that stand before it."""
    last: list[Record] = []
    for line in lines:
        while last and last[-1]["step"] >= line["step"]:
            last.pop()
        last.append(line)
    return last
