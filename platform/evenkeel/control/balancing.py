"""Work goes where it is done fastest: what is measured while a world runs leads to another layout, at a pause."""

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from statistics import median

from evenkeel.control import placing
from evenkeel.control.modes import Gathering
from evenkeel.control.speeds import SAMPLES, Tracker
from evenkeel.control.state import State
from evenkeel.core.ids import WorkerId
from evenkeel.core.layout import Layout, WorkerInfo
from evenkeel.core.vote import Timing
from evenkeel.core.world import World
from evenkeel.plan.balance import Keep, Rebalance, Situation, decide
from evenkeel.plan.copies import shards_in
from evenkeel.plan.coverage import lost_slices
from evenkeel.plan.layout import Infeasible, Planned
from evenkeel.plan.memory import fits
from evenkeel.plan.mirrors import are_needed
from evenkeel.plan.speeds import MIN_GAIN, Speeds

CAUSE = "rebalance"
JUDGED = 8
"""Steps after a change of which the median is what it has brought; the first one of a generation does not count."""
FORGIVEN = 100
"""After steps that took so many times what a pause costs one change that failed is forgotten: so failures cost at most
some hundredths of the time, and a run of weeks does not stay with what was wrong in its first hour."""


@dataclass(slots=True)
class Judged:
    """A change that was made, until it is known what it has brought.

    Attributes:
        before_s: what a step took before it.
        steps_s: what steps have taken since.
    """

    change: Rebalance
    before_s: float
    steps_s: list[float] = field(default_factory=list)


@dataclass
class Balance:
    """What the controller knows of speeds and does about them; in no journal, as it is measured anew in no time.

    Attributes:
        wanted: the change to be made at the pause that is asked for.
        lost_s: what has been lost since it was first seen that a change would win: the pause is due when that is as
            much as it costs. So a slowness that comes and goes costs at most twice what it would if one knew when.
        pause_s: what the last repair cost, without what it took to notice that it was needed.
        repair_s: the same and what else the first step took, until it is known what the next ones take; then 0.
        steps_s: what the last steps of this world took, but for its first.
        benched: workers that cost more than they gave; they have no place unless there is no world without them.
        failed: changes that brought less than half of what was predicted: each doubles what the next must win.
        quiet_s: what steps have taken since `failed` last changed.
    """

    tracker: Tracker
    wanted: Rebalance | None = None
    lost_s: float = 0.0
    pause_s: float = 0.0
    repair_s: float = 0.0
    judged: Judged | None = None
    steps_s: deque[float] = field(default_factory=lambda: deque(maxlen=JUDGED))
    benched: set[WorkerId] = field(default_factory=set)
    failed: int = 0
    quiet_s: float = 0.0

    @property
    def step_s(self) -> float:
        """What a step takes in this world; 0 if that is not known."""
        return median(self.steps_s) if self.steps_s else 0.0


def balance_of(s: State) -> Balance:
    """Begun when it is first asked for."""
    if s.balance is None:
        costs = tuple(layer.cost for layer in s.policy.model.layers)
        begins = s.policy.profiled or Speeds(costs if any(costs) else (1.0,) * len(costs))
        s.balance = Balance(Tracker(begins.costs, begins.kinds))
    return s.balance


# ---------------------------------------------------------------- while a world runs


def measured(s: State, world: World, timings: Sequence[Timing]) -> bool:
    """Hears what everybody has measured. Returns whether a pause is to be asked for, as another layout is wanted."""
    if not s.policy.rebalance or not timings:
        return False
    b = balance_of(s)
    if not b.tracker.workers:
        b.tracker.opened(world.layout)  # a new life of the controller goes on with a world that it has not opened
    b.tracker.heard(timings)
    nodes = {worker: str(node) for worker, node in world.nodes}
    for source, worker, rate, usual in b.tracker.slow_links(nodes):
        reason = f"{rate:.3g} bytes/s from {source} to {worker}; such links have had {usual:.3g}"
        s.log("slow_link", workers=[source, worker], reason=reason)
    steps_left = s.policy.last_step - s.committed.step - 1
    if b.wanted is not None or b.judged is not None or steps_left < 1 or not b.steps_s:
        return False
    decision = decide(world.layout, b.tracker.speeds(), _situation(s, b, world, steps_left))
    if isinstance(decision, Keep):
        b.lost_s = 0.0
        return False
    assert world.measure_every is not None
    # The speeds that a change rests on have been so for SAMPLES samples.
    b.lost_s += decision.gain_s * world.measure_every * (SAMPLES if not b.lost_s else 1)
    if b.lost_s < b.pause_s:
        return False
    b.wanted = decision
    return True


def committed(s: State, step_s: float | None) -> None:
    """A step took so long, None if it is the first of its generation; maybe that tells what a change has brought."""
    if not s.policy.rebalance or step_s is None:
        return
    b = balance_of(s)
    b.steps_s.append(step_s)
    if b.repair_s:
        b.pause_s = max(0.0, b.repair_s - b.step_s)
        b.repair_s = 0.0 if len(b.steps_s) == JUDGED else b.repair_s
    b.quiet_s += step_s
    if b.failed and b.quiet_s >= FORGIVEN * b.pause_s:
        b.failed, b.quiet_s = b.failed - 1, 0.0
    judged = b.judged
    if judged is None:
        return
    judged.steps_s.append(step_s)
    if len(judged.steps_s) < JUDGED:
        return
    b.judged = None
    after_s, predicted_s = median(judged.steps_s), judged.change.gain_s
    gain_s = judged.before_s - after_s
    b.failed, b.quiet_s = (b.failed + 1 if 2 * gain_s < predicted_s else 0), 0.0
    if b.failed:
        b.benched.difference_update(judged.change.out)
    s.log(
        "rebalance_measured",
        what=judged.change.what,
        predicted_gain_s=round(predicted_s, 6),
        gain_s=round(gain_s, 6),
        step_s_before=round(judged.before_s, 6),
        step_s_after=round(after_s, 6),
        reason=f"a step takes {after_s:.3g} s instead of {judged.before_s:.3g}; predicted was {predicted_s:.3g} s less",
    )


def weighs(s: State) -> bool:
    """Whether a change would win, is wanted, or was made and is judged."""
    b = s.balance
    return b is not None and (b.lost_s > 0 or b.wanted is not None or b.judged is not None)


def repaired(s: State, now: float) -> None:
    """The first step after a repair is committed: what the repair took, but for noticing and waiting."""
    if s.incident is not None and s.policy.rebalance:
        b = balance_of(s)
        b.pause_s = b.repair_s = now - s.incident.formed_at + s.incident.settled_at - s.incident.aborted_at


def joined(s: State, forming_s: float) -> None:
    """A world runs, that took so long to form: until a repair was measured, a pause costs at least that."""
    if not s.policy.rebalance:
        return
    b = balance_of(s)
    b.pause_s = b.pause_s or forming_s


def lost(s: State, worker: WorkerId) -> None:
    if s.balance is not None:
        s.balance.tracker.lost(worker)
        s.balance.benched.discard(worker)


def _situation(s: State, b: Balance, world: World, steps_left: int) -> Situation:
    layout = world.layout
    members = [s.roster.alive[w] for w in layout.members if w in s.roster.alive]
    spares = [info for w, info in sorted(s.roster.alive.items()) if w not in layout.places and w not in b.benched]
    infos = (*members, *spares)
    return Situation(
        workers=infos,
        steps_left=steps_left,
        pause_s=b.pause_s,
        stage_fits=placing.room(s, layout),
        fits=lambda after: _has_room(s, after) and _has_state(s, world, after) and _has_copies(s, world, after),
        without=lambda workers: placing.plan(s, workers, b.tracker.speeds()),
        min_gain=min(0.9, MIN_GAIN * 2**b.failed),
    )


def _has_room(s: State, layout: Layout) -> bool:
    policy = s.policy
    return fits(layout, policy.model, placing.infos(s, layout), policy.precision, policy.uses, policy.copies)


def _has_state(s: State, world: World, layout: Layout) -> bool:
    """Whether those who stay keep all of the state between them: only members of a world move anything."""
    if set(layout.members) >= set(world.layout.members):
        return True
    kept = shards_in(world, s.policy.model)
    return not lost_slices(s.policy.model, (kept[w] for w in world.layout.members if w in layout.places))


def _has_copies(s: State, world: World, layout: Layout) -> bool:
    """Whether the state is kept as often as it was asked for, twice if that is left to evenkeel, or as often as now if
    that is less; or else mirrors make good for it."""
    copies, _ = s.policy.copies_in(layout, placing.infos(s, layout))
    if s.policy.mirror_every and are_needed(layout, copies):
        return True
    return _kept(layout, copies) >= min(s.policy.copies or 2, _kept(world.layout, world.copies))


def _kept(layout: Layout, copies: int | None) -> int:
    """How many workers keep each slice."""
    return min(copies or len(layout.pipelines), len(layout.pipelines))


# ---------------------------------------------------------------- when a world is formed


def plan(s: State, candidates: Sequence[WorkerInfo]) -> Planned | Infeasible:
    """The layout for these workers: the one that is wanted if all who have a place in it are here and there is none for
    more of them, else one by what is known of their speeds.

    Who was evicted is no candidate if there can be a world without, and if the others hold all of the state.
    """
    if not s.policy.rebalance:
        return placing.plan(s, candidates, None)
    b = balance_of(s)
    speeds = b.tracker.speeds()
    wanted = _wanted(b, [info.worker_id for info in candidates])
    out = b.benched if wanted is None else b.benched | set(wanted.out)
    others = [info for info in candidates if info.worker_id not in out]
    if out and isinstance(s.mode, Gathering) and not placing.hold_all(s, [info.worker_id for info in others]):
        out, others = set(), list(candidates)
    planned = placing.plan(s, others, speeds)
    if isinstance(planned, Infeasible) and out:
        planned = placing.plan(s, candidates, speeds)
    if wanted is None or isinstance(planned, Infeasible):
        return planned
    if len(planned.layout.members) > len(wanted.layout.members):
        return planned
    unused = tuple(info.worker_id for info in candidates if info.worker_id not in wanted.layout.places)
    return Planned(wanted.layout, wanted.reason, unused)


def _wanted(b: Balance, here: Iterable[WorkerId]) -> Rebalance | None:
    """The change that is to be made, if all who have a place in its layout are here; else it is void."""
    return b.wanted if b.wanted is not None and set(here).issuperset(b.wanted.layout.members) else None


def replayed(s: State, before: Layout | None, world: World) -> None:
    """A world of the journal: who was evicted for it stays without a place."""
    if s.policy.rebalance and before is not None:
        b = balance_of(s)
        b.benched.update(before.members if world.cause == CAUSE else ())
        b.benched.difference_update(world.layout.members)


def opened(s: State, world: World) -> None:
    """A world is to be formed, with the layout that was wanted or another one."""
    if not s.policy.rebalance:
        return
    b = balance_of(s)
    change = _wanted(b, s.roster.alive)
    before_s = b.step_s
    b.wanted, b.judged, b.lost_s = None, None, 0.0
    b.steps_s.clear()
    b.repair_s = 0.0
    b.benched.update(change.out if change is not None else ())
    b.benched.difference_update(world.layout.members)  # there was no world without them, and so they count again
    if change is not None and change.layout == world.layout:
        b.judged = Judged(change, before_s)
        s.log(
            "rebalanced",
            what=change.what,
            reason=change.reason,
            predicted_gain_s=round(change.gain_s, 6),
            predicted_gain=round(change.gain_s / change.now_s, 4),
            pause_s=round(b.pause_s, 6),
            workers=list(change.out),
        )
    b.tracker.opened(world.layout)
