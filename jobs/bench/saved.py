"""What checkpoints cost a run, from what was measured inside its workers (bench/probe.py) or by a peer itself."""

from collections.abc import Mapping, Sequence
from itertools import groupby
from statistics import geometric_mean, median
from typing import Any

from bench.process import BenchError
from bench.work import WARM_UP, Steps

Line = Mapping[str, Any]

FLOOR, PLAIN, WRITES, MEMORY = "floor", "plain", "writes", "memory"
"""What can be measured inside: the time of one memory copy, the faster of two, just before each of ours; the cost of
writing the same bytes plainly beside each write of ours; what a checkpoint takes, which those two imply; the most
memory ever taken."""
SWITCH_S = 0.02
"""From the end of a copy to the first byte of its writing, at most: another thread has to wake up."""


def stall_ratio(steps: Steps) -> float:
    """How long a checkpoint holds up the training, in plain memory copies of the same bytes; the median of all.

    Of each checkpoint the slowest worker counts, and the slowest copy: they do both at the same time.

    Raises:
        BenchError: if no checkpoint was measured.
    """
    return median(_slowest(lines, "copy_s") / _slowest(lines, "floor_s") for lines in _checkpoints(steps, "floor_s"))


def stall_s(steps: Steps) -> float:
    """Seconds that a checkpoint holds up the training, of ours or of a peer."""
    return median(_slowest(lines, "copy_s") for lines in _checkpoints(steps, "copy_s"))


def floor_s(steps: Steps) -> float:
    """Seconds that one memory copy takes."""
    return median(_slowest(lines, "floor_s") for lines in _checkpoints(steps, "floor_s"))


def late_s(steps: Steps) -> float | None:
    """By how much a step with a checkpoint before it comes later than others, without the copies made to measure it.

    In it are the copy, and what the writing takes of the cores; checkpoints that were first written plainly, for the
    comparison, do not count. None if none is left, or something was being written in every step.
    """
    longer, normal = [], []
    by_step = {
        lines[0]["step"]: lines
        for lines in _checkpoints(steps, "floors_s")
        if not any(line.get("plain_first") for line in lines)
    }
    for step in range(WARM_UP + 1, steps.last + 1):
        took = steps.ends[step] - steps.ends[step - 1]
        if step - 1 in by_step:
            longer.append(took - _slowest(by_step[step - 1], "floors_s"))
        elif not _writing(steps, steps.ends[step - 1], steps.ends[step]):
            normal.append(took)
    return median(longer) - median(normal) if longer and normal else None


def cpu_ratio(steps: Steps) -> float:
    """CPU seconds of a worker's part, from the copy to the last byte, over those of writing the same bytes plainly.

    Who writes second finds memory that is easier to get, so both orders count alike, however often there was each.

    Raises:
        BenchError: if no part was measured.
    """
    found = [line for lines in _checkpoints(steps, "plain_cpu_s", "copy_cpu_s") for line in lines]
    ratios: dict[bool, list[float]] = {}
    for line in found:
        ratio = (line["copy_cpu_s"] + line["write_cpu_s"]) / line["plain_cpu_s"]
        ratios.setdefault(bool(line.get("plain_first")), []).append(ratio)
    return geometric_mean(map(median, ratios.values()))


def slowdown(steps: Steps) -> float:
    """Step time while a part is being written, over that of the other steps; medians. Only for one worker.

    A step counts if all of it lies within the writing, from the moment at which its copy was made.

    Raises:
        BenchError: if there are no steps of one of the two kinds.
    """
    copied = {line["step"]: line["copied_at"] for line in steps.inside if "copied_at" in line}
    during, normal = [], []
    for step in range(WARM_UP + 1, steps.last + 1):
        start, stop = copied.get(step - 1, steps.ends[step - 1]), steps.ends[step]
        if any(line["write_began"] <= start + SWITCH_S and stop <= line["write_ended"] for line in writes(steps)):
            during.append(stop - start)
        elif not _writing(steps, start, stop):
            normal.append(stop - start)
    if not during or not normal:
        few = "during the writing of a part" if not during else "while no part was written"
        raise BenchError(f"no whole step {few}: {len(during)} during, {len(normal)} beside")
    return median(during) / median(normal)


def peaks(steps: Steps) -> dict[str, int]:
    """The most bytes that each worker ever had in memory.

    Raises:
        BenchError: if it was not measured.
    """
    found: dict[str, int] = {}
    for line in steps.inside:
        if "peak_bytes" in line:
            found[line["worker"]] = max(line["peak_bytes"], found.get(line["worker"], 0))
    if not found:
        raise BenchError("no worker told how much memory it had")
    return found


def extra_memory(saving: Steps, without: Steps) -> float:
    """What checkpoints add to a worker's peak of memory, in sizes of the part that it writes; of the worst worker.

    Raises:
        BenchError: if one of the runs did not tell, or the first wrote nothing.
    """
    before = peaks(without)
    part = {line["worker"]: line["bytes"] for line in writes(saving)}
    return max((peak - before[worker]) / part[worker] for worker, peak in peaks(saving).items())


def writes(steps: Steps) -> list[Line]:
    """The lines of all parts that were written.

    Raises:
        BenchError: if there are none.
    """
    found = [line for line in steps.inside if "write_ended" in line]
    if not found:
        raise BenchError("no part of a checkpoint was written")
    return found


def _writing(steps: Steps, start: float, stop: float) -> bool:
    """Whether anything was written between these unix times, plainly or as ours are."""
    return any(line["began"] < stop and start < line["ended"] for line in writes(steps))


def _checkpoints(steps: Steps, *keys: str) -> list[Sequence[Line]]:
    """The lines of each checkpoint after the warm-up in which all of this was measured; not of the last step's, which
    may have been made after the training."""
    lines = [line for line in steps.inside if line.keys() >= set(keys) and WARM_UP <= line["step"] < steps.last]
    if not lines:
        raise BenchError(f"no checkpoint was made after step {WARM_UP} with all of: {', '.join(keys)}")
    ordered = sorted(lines, key=_step)
    return [list(group) for _, group in groupby(ordered, key=_step)]


def _step(line: Line) -> int:
    return int(line["step"])


def _slowest(lines: Sequence[Line], key: str) -> float:
    return max(float(line[key]) for line in lines)
