"""Whether moving work between workers of unequal speed pays, and what is moved: a pure decision, with its reason."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median

from evenkeel.core.ids import WorkerId
from evenkeel.core.layout import Layout, WorkerInfo
from evenkeel.plan.layout import Infeasible, Planned
from evenkeel.plan.speeds import MIN_GAIN, Fits, Speeds, recut_by

CUTS_GAIN = 0.05
"""The least part that moving layers must win beyond what shares alone do, as it moves state."""
SLOW = 1.5
"""A worker that takes less than so many times as long as the median is no candidate for eviction."""


@dataclass(frozen=True, slots=True)
class Keep:
    """The layout stays as it is."""

    reason: str


@dataclass(frozen=True, slots=True)
class Rebalance:
    """Another layout is to be formed at a pause.

    Attributes:
        what: "shares" of micro-batches, "cuts" (layers move, shares with them), or "eviction".
        now_s, then_s: seconds of a step's passes, as predicted for the layout that is and for the new one.
        out: whoever costs more than it gives, and has no place any more.
    """

    what: str
    layout: Layout
    now_s: float
    then_s: float
    reason: str
    out: tuple[WorkerId, ...] = ()

    @property
    def gain_s(self) -> float:
        return self.now_s - self.then_s


@dataclass(frozen=True, slots=True)
class Situation:
    """What a decision rests on, beside the layout and the speeds.

    Attributes:
        workers: who could have a place, members first.
        steps_left: after the one that is under way.
        pause_s: what a change costs.
        min_gain: see MIN_GAIN.
        stage_fits: see plan/memory.py.
        fits: whether the members of a layout have room for it, and nothing of the state is lost with those who have no
            place in it, nor kept by fewer than it must be.
        without: a layout for these workers, by their speeds.
    """

    workers: tuple[WorkerInfo, ...]
    steps_left: int
    pause_s: float
    stage_fits: Fits
    fits: Callable[[Layout], bool]
    without: Callable[[Sequence[WorkerInfo]], Planned | Infeasible]
    min_gain: float = MIN_GAIN


def decide(layout: Layout, measured: Speeds, at: Situation) -> Keep | Rebalance:
    """Shares first, then cuts; eviction only of a worker that costs more than it gives.

    The time of a step is predicted as in batch.shares: of each pipeline's slowest stage or link, and its bubble. A
    change is made if it wins enough of a step, and in the steps that are left more than the pause costs.
    """
    unknown = [worker for worker in layout.members if worker not in measured.paces]
    if unknown:
        return Keep(f"not measured yet: {_names(unknown)}")
    speeds = measured.for_all(at.workers)
    now_s = speeds.finish_s(layout)
    best = _best_for_all(layout, speeds, at, now_s)
    without = _without_slowest(layout, speeds, at, now_s)
    least = min(now_s, best.then_s if best else now_s)
    if without is not None and least - without.then_s >= at.min_gain * now_s:
        best = without
    if best is None:
        return Keep(f"as good as it can be: {now_s:.3g} s of passes a step")
    gain = best.gain_s / now_s
    if gain < at.min_gain:
        return Keep(f"other {best.what} would win {gain:.1%} of the passes, less than {at.min_gain:.0%}")
    if best.gain_s * at.steps_left <= at.pause_s:
        win = f"{best.gain_s:.3g} s in each of the {at.steps_left} steps that are left"
        return Keep(f"other {best.what} would win {win}; the pause costs {at.pause_s:.3g} s")
    return best


def _best_for_all(layout: Layout, speeds: Speeds, at: Situation, now_s: float) -> Rebalance | None:
    shares = speeds.shared(layout)
    shares_s = speeds.finish_s(shares)
    cuts = recut_by(layout, speeds, at.stage_fits)
    cuts_s = speeds.finish_s(cuts)
    slow = _slow(layout, speeds)
    if shares_s - cuts_s >= CUTS_GAIN * now_s and at.fits(cuts):
        reason = f"{slow}: {_moves(layout, cuts)}, {_times(now_s, cuts_s)}"
        return Rebalance("cuts", cuts, now_s, cuts_s, reason)
    if shares_s < now_s:
        reason = f"{slow}: {_counts(shares)} micro-batches instead of {_counts(layout)}, {_times(now_s, shares_s)}"
        return Rebalance("shares", shares, now_s, shares_s, reason)
    return None


def _without_slowest(layout: Layout, speeds: Speeds, at: Situation, now_s: float) -> Rebalance | None:
    """A layout in which the slowest member has no place, but maybe a spare."""
    slowest = max(layout.members, key=lambda worker: speeds.paces[worker])
    if len(layout.members) < 2 or speeds.paces[slowest] < SLOW * _usual(layout, speeds):
        return None
    planned = at.without([info for info in at.workers if info.worker_id != slowest])
    if isinstance(planned, Infeasible) or not at.fits(planned.layout):
        return None
    after = speeds.shared(planned.layout)
    then_s = speeds.finish_s(after)
    comes = [worker for worker in after.members if worker not in layout.places]
    instead = f", {_names(comes)} takes its place" if comes else ""
    reason = f"{_slow(layout, speeds)}: {slowest} costs more than it gives{instead}, {_times(now_s, then_s)}"
    return Rebalance("eviction", after, now_s, then_s, reason, (slowest,))


def _usual(layout: Layout, speeds: Speeds) -> float:
    return median(speeds.paces[worker] for worker in layout.members)


def _slow(layout: Layout, speeds: Speeds) -> str:
    """Who is off the others' speed, or the link that is slower than what it leads to."""
    for pipeline in layout.pipelines:
        for before, stage in zip(pipeline.stages, pipeline.stages[1:], strict=False):
            receives = max(speeds.receives.get(worker, 0.0) for worker in stage.members)
            if receives > max(map(speeds.stage_s, pipeline.stages)):
                return f"the link between {before.members[0]} and {stage.members[0]} is slower than their stages"
    fastest = min(layout.members, key=lambda worker: speeds.paces[worker])
    slowest = max(layout.members, key=lambda worker: speeds.paces[worker])
    times = speeds.paces[slowest] / speeds.paces[fastest]
    return f"{slowest} takes {times:.2f} times as long as {fastest}" if times > 1.05 else "the work is uneven"


def _times(now_s: float, then_s: float) -> str:
    return f"{then_s:.3g} s of passes a step instead of {now_s:.3g}"


def _counts(layout: Layout) -> str:
    counts = [str(pipeline.share) for pipeline in layout.pipelines]
    return " + ".join(counts[:8]) + (f" + {len(counts) - 8} more" if len(counts) > 8 else "")


def _moves(layout: Layout, after: Layout) -> str:
    """Which layers of which pipelines move, and the shares if they change."""
    told = []
    for i, (old, new) in enumerate(zip(layout.pipelines, after.pipelines, strict=True)):
        if [s.start for s in old.stages] != [s.start for s in new.stages]:
            was, are = (" + ".join(str(s.stop - s.start) for s in p.stages) for p in (old, new))
            told.append(f"pipeline {i} in {are} layers instead of {was}")
    more = f" and {len(told) - 3} more" if len(told) > 3 else ""
    shares = f", {_counts(after)} micro-batches" if _counts(after) != _counts(layout) else ""
    return ", ".join(told[:3]) + more + shares


def _names(workers: Sequence[WorkerId]) -> str:
    return ", ".join(workers[:3]) + (f" and {len(workers) - 3} more" if len(workers) > 3 else "")
