"""Two workers of unequal speed: what they give together, when the product finds out and divides the work by itself."""

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import groupby
from pathlib import Path
from statistics import median

import numpy as np

from bench.lab import Lab, Round, ratios
from bench.process import BenchError
from bench.rows import CLOSE, Bound, Found, Result, interval_text, results
from bench.sides import product, static, static_at_once
from bench.work import Steps, Work, check_same_work
from evenkeel.plan.batch import shares

EARLY = 2
"""First steps that are never measured: connections, memory that is used for the first time."""
MICRO_BATCHES = 30
"""So many that 2 : 1, 4 : 1 and 6.4 : 1 are whole numbers of them, or nearly (26 and 4)."""
SHARES = (("shares_2", 2.0), ("shares_4", 4.0), ("shares_6_4", 6.4))
FACTOR = 4.0
"""How many times as slow the slow worker is in `cuts` and `mid_run`."""


@dataclass(frozen=True, slots=True)
class Size:
    """What is trained, and for how long.

    A decoder with few parameters and many tokens: what a step takes beside its passes must be little against them.
    Steps take a second: of two that wait for each other after 0.3 s each loses what the machine takes from the other.

    Attributes:
        model: keys of section `model`.
        deep: those for `cuts`, with more layers.
        micro_batch: in samples.
        settle: in so many steps the product is to have measured the workers and divided the work.
        measured: steps after that.
        alone: steps of the fast worker by itself that are measured, but at least FEWEST of the slow one.
        tried, trials: steps that are measured with each possible cut, and how often each is tried.
        slow_from: the first slow step of `mid_run`.
    """

    model: Mapping[str, object] = field(default_factory=lambda: {"d_model": 64, "layers": 2, "seq_len": 96})
    deep: Mapping[str, object] = field(default_factory=lambda: {"d_model": 64, "layers": 6, "seq_len": 64})
    micro_batch: int = 16
    settle: int = 20
    measured: int = 16
    alone: int = 14
    tried: int = 3
    trials: int = 3
    slow_from: int = 9

    def work(self, steps: int, slowdown: Mapping[int, float]) -> Work:
        batch = (MICRO_BATCHES * self.micro_batch, self.micro_batch)
        return Work(steps, model=self.model, batch=batch, schedule="constant", slowdown=slowdown)


NORMAL = Size()
FEWEST = 3
"""Steps of the slow worker by itself that are measured at least."""


def unequal(lab: Lab, pairs: int | None, size: Size = NORMAL) -> Result:
    """Rank 1 is slowed by burning processor time; the product is told nothing of it."""
    count = pairs or CLOSE
    rows = [partial(shares_row, name=name, factor=factor) for name, factor in SHARES]
    return results("unequal", [_timed(row, lab, count, size) for row in (*rows, cuts_row, mid_run_row)])


def _timed(row: Callable[[Lab, int, Size], Found], lab: Lab, count: int, size: Size) -> Found:
    began = time.monotonic()
    found = row(lab, count, size)
    return replace(found, notes=[*found.notes, f"took {(time.monotonic() - began) / 60:.1f} minutes"])


# ------------------------------------------------------------ shares


@dataclass(frozen=True, slots=True)
class Shared:
    """One round of `shares`.

    Attributes:
        of_sum: steps per second of both together, over the sum of those of each by itself.
        equal: the same of the steps before the product divided the work anew; None if it began with other than equal
            shares.
        shares: micro-batches of each worker at the end.
        together_s, fast_s, slow_s: seconds per step.
        busy, others: cores that our run kept busy, and that others did meanwhile; None if nobody watched.
    """

    of_sum: float
    equal: float | None
    shares: tuple[int, ...]
    together_s: float
    fast_s: float
    slow_s: float
    busy: float | None
    others: float | None

    def __str__(self) -> str:
        equal = "" if self.equal is None else f"; with equal shares {self.equal:.3f}"
        times = f"{self.together_s:.3f} s together, {self.fast_s:.3f} and {self.slow_s:.3f} s each by itself"
        return f"shares {_numbers(self.shares)}: {self.of_sum:.3f} of the sum ({times}){equal}"


def shares_row(lab: Lab, count: int, size: Size, name: str, factor: float) -> Found:
    what = f"1 of 2 workers {factor:g} times as slow: tokens/s, together / sum of each by itself"
    found = lab.repeat(name, count, partial(shared, size, factor))
    values = [one.of_sum for one in found]
    return Found(
        Bound(name, "ratio", 0.95, 1.0, ">=", CLOSE, what),
        values,
        count,
        [*_shared_lines(found), interval_text(values), *lab.reasons([name])],
    )


def _shared_lines(found: Sequence[Shared]) -> Iterator[str]:
    if equal := [one.equal for one in found if one.equal is not None]:
        yield f"equal shares: {median(equal):.3f} of the sum"
    for chosen, ones in groupby(sorted(found, key=lambda one: one.shares), key=lambda one: one.shares):
        yield f"shares {_numbers(chosen)}: {len(list(ones))} times"
    if found:
        times = (median(getattr(one, name) for one in found) for name in ("together_s", "fast_s", "slow_s"))
        yield "step {:.0f} ms, by itself {:.0f} and {:.0f} ms".format(*(1000 * seconds for seconds in times))
    if others := [one.others for one in found if one.others is not None]:
        yield f"others {max(0.0, median(others)):.2f} cores"


def shared(size: Size, factor: float, folder: Path, number: int) -> Shared:
    """Both together under the controller, and each by itself; in rounds of odd numbers in the other order.

    Raises:
        BenchError: if a run fails, or did other work than the others.
    """
    work = replace(size.work(size.settle + size.measured, {1: factor}), data=2)
    own = folder / "together"
    own.mkdir()
    if number % 2 == 0:
        ours, alone = product(work).run(own), by_themselves(size, factor, folder)
    else:
        alone, ours = by_themselves(size, factor, folder), product(work).run(own)
    for one in alone:
        check_same_work(ours, one, "each by itself")
    fast, slow = _paces(*alone)
    start, stop = ours.ends[size.settle], ours.ends[ours.last]
    together = pace(ours, start, stop)
    arranged = arrangements(ours)
    first = arranged[0]
    equal = None
    if len(set(first.shares)) == 1 and first.last > EARLY:
        equal = pace(ours, ours.ends[EARLY], ours.ends[first.last]) / (fast + slow)
    used, others = ours.cpu.own_between(start, stop), ours.cpu.foreign_cores(start, stop)
    return Shared(
        together / (fast + slow), equal, arranged[-1].shares, 1 / together, 1 / fast, 1 / slow,
        None if used is None else used / (stop - start), others,
    )  # fmt: skip


def by_themselves(size: Size, factor: float, folder: Path) -> tuple[Steps, Steps]:
    """The fast and the slow worker as two runs of one worker each, which know nothing of each other, at the same time.

    At the same time, so that each has a core and no more of the machine than it has when both train together: one that
    has the machine to itself is faster, by far where two cores are the two threads of one.
    """
    slow_steps = EARLY + max(FEWEST, round(size.alone / factor))
    fast_steps = int(slow_steps * factor) + EARLY
    fast, slow = static_at_once((size.work(fast_steps, {}), size.work(slow_steps, {0: factor})), folder)
    return fast, slow


def _paces(*runs: Steps) -> tuple[float, ...]:
    """Steps per second of runs that went on side by side, in the stretch in which all of them were at work."""
    start = max(run.ends[EARLY] for run in runs)
    stop = min(run.ends[run.last] for run in runs)
    if start >= stop:
        raise BenchError("those that were to run by themselves at the same time did not")
    return tuple(pace(run, start, stop) for run in runs)


def pace(steps: Steps, start: float, stop: float) -> float:
    """Steps per second between two instants; one that is under way counts by the part of its time."""
    numbers = sorted(steps.ends)
    done = np.interp([start, stop], [steps.ends[n] for n in numbers], numbers)
    return float(done[1] - done[0]) / (stop - start)


# ------------------------------------------------------------ cuts


CUTS = Bound(
    "cuts", "ratio", 0.9, 1.0, ">=", CLOSE,
    f"PP 2, the last stage {FACTOR:g} times as slow: tokens/s, cut as evenkeel chose / as is best of all cuts",
)  # fmt: skip


def cuts_row(lab: Lab, count: int, size: Size) -> Found:
    slowdown = {1: FACTOR}
    work = replace(size.work(size.settle + size.measured, slowdown), pipeline=2, model=size.deep)
    ours = product(work, "evenkeel, cuts")
    trials = try_cuts(lab, size, replace(work, steps=EARLY + size.tried))
    if not trials:
        return Found(CUTS, [], count, lab.reasons([_cut_name(cut) for cut in _possible(work)]))
    best = min(trials, key=lambda cut: trials[cut])
    peer = static(replace(work, steps=EARLY + size.measured), "best cut", layout={"cuts": str(best)})
    rounds = lab.rounds((ours, peer), count)
    values = ratios(rounds, peer.name, ours.name, partial(tail_s, size.measured))
    told = ", ".join(f"{cut}: {1000 * seconds:.0f} ms" for cut, seconds in trials.items())
    chosen = _chosen(rounds, ours.name, lambda last: _numbers(last.cuts))
    lines = [f"step by the first layer of stage 1: {told}", chosen, interval_text(values)]
    names = [ours.name, peer.name, *map(_cut_name, _possible(work))]
    return Found(CUTS, values, count, [*lines, *lab.reasons(names)])


def try_cuts(lab: Lab, size: Size, work: Work) -> dict[int, float]:
    """The median seconds per step with each cut that there is, by the first layer of the second stage."""
    sides = {cut: static(work, _cut_name(cut), layout={"cuts": str(cut)}) for cut in _possible(work)}
    rounds = lab.rounds(list(sides.values()), size.trials)
    found = {cut: [tail_s(size.tried, r[side.name]) for r in rounds if side.name in r] for cut, side in sides.items()}
    return {cut: median(seconds) for cut, seconds in found.items() if seconds}


def _possible(work: Work) -> range:
    """Depth is that of the blocks, embedding and head."""
    return range(1, int(str(work.model["layers"])) + 2)


def _cut_name(cut: int) -> str:
    return f"stage 1 from layer {cut}"


# ------------------------------------------------------------ slowed in mid-run


MID_RUN = Bound(
    "mid_run", "ratio", 0.93, 1.0, ">=", CLOSE,
    f"1 of 2 workers becomes {FACTOR:g} times as slow: tokens/s from 20 steps later on / engine, planned for it",
)  # fmt: skip
WITHIN = 20
"""Steps after the slowdown in which the product is to be back."""


def mid_run_row(lab: Lab, count: int, size: Size) -> Found:
    slowed = replace(size.work(size.slow_from - 1 + WITHIN + size.measured, {1: FACTOR}), data=2)
    ours = product(replace(slowed, slow_from=size.slow_from), "evenkeel, mid-run")
    planned = _numbers(shares((1.0, FACTOR), MICRO_BATCHES))
    fresh = static(replace(slowed, steps=EARLY + size.measured), "fresh plan", layout={"shares": planned})
    rounds = lab.rounds((ours, fresh), count)
    values = ratios(rounds, fresh.name, ours.name, partial(tail_s, size.measured))
    chosen = _chosen(rounds, ours.name, lambda last: f"{_numbers(last.shares)} from step {last.first} on")
    lines = [f"planned: {planned}; slow from step {size.slow_from} on", chosen, interval_text(values)]
    return Found(MID_RUN, values, count, [*lines, *lab.reasons([ours.name, fresh.name])])


# ------------------------------------------------------------ parts


@dataclass(frozen=True, slots=True)
class Arrangement:
    """How the work was divided in steps `first` to `last`.

    Attributes:
        shares: micro-batches of each pipeline.
        cuts: the first layer of each stage of the first pipeline but its first stage.
    """

    first: int
    last: int
    shares: tuple[int, ...]
    cuts: tuple[int, ...]


def arrangements(steps: Steps) -> list[Arrangement]:
    """One for each generation that committed steps, from its run directory."""
    assert steps.run is not None
    lines = map(json.loads, (steps.run / "metrics.jsonl").read_text().splitlines())
    found = []
    for generation, group in groupby(lines, key=lambda line: line["generation"]):
        numbers = [line["step"] for line in group]
        world = json.loads((steps.run / "worlds" / f"{generation:06d}.json").read_text())
        pipelines = world["layout"]["pipelines"]
        counts = tuple(stop - start for start, stop in (p["micro_batches"] for p in pipelines))
        cuts = tuple(stage["layers"][0] for stage in pipelines[0]["stages"][1:])
        found.append(Arrangement(numbers[0], numbers[-1], counts, cuts))
    return found


def tail_s(count: int, steps: Steps) -> float:
    """Seconds per step over the last so many: a stall counts."""
    return (steps.ends[steps.last] - steps.ends[steps.last - count]) / count


def _chosen(rounds: Sequence[Round], ours: str, text: Callable[[Arrangement], str]) -> str:
    """What the product ended with, round by round."""
    return "chosen: " + "; ".join(text(arrangements(r[ours])[-1]) for r in rounds if ours in r)


def _numbers(values: Sequence[int]) -> str:
    return ",".join(map(str, values))
