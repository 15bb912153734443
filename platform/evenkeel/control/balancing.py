"""Work goes where it is done fastest: what is measured while a world runs leads to another layout, at a pause."""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from statistics import median

from evenkeel.control.modes import Gathering
from evenkeel.control.speeds import SAMPLES, Tracker
from evenkeel.control.state import State
from evenkeel.core.ids import INITIAL, WorkerId
from evenkeel.core.layout import Layout, WorkerInfo, slowed_kind
from evenkeel.core.vote import Timing
from evenkeel.core.world import World
from evenkeel.plan.balance import Keep, Rebalance, Situation, decide
from evenkeel.plan.copies import shards_in
from evenkeel.plan.coverage import lost_slices
from evenkeel.plan.layout import Infeasible, Planned, plan_layout
from evenkeel.plan.memory import Uses, fits, stage_fits
from evenkeel.plan.speeds import MIN_GAIN, Fits, Speeds

CAUSE = "rebalance"
JUDGED = 8
"""Steps after a change of which the median is what it has brought; the first one of a generation does not count."""


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
        steps_s: what the last steps took.
        benched: workers that cost more than they gave; they have no place unless there is no world without them.
        failed: changes in a row that brought less than half of what was predicted: each doubles what the next must win.
    """

    tracker: Tracker
    wanted: Rebalance | None = None
    lost_s: float = 0.0
    pause_s: float = 0.0
    judged: Judged | None = None
    steps_s: deque[float] = field(default_factory=lambda: deque(maxlen=JUDGED))
    benched: set[WorkerId] = field(default_factory=set)
    failed: int = 0


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
    if b.wanted is not None or b.judged is not None or steps_left < 1:
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
    judged = b.judged
    if judged is None:
        return
    judged.steps_s.append(step_s)
    if len(judged.steps_s) < JUDGED:
        return
    b.judged = None
    after_s, predicted_s = median(judged.steps_s), judged.change.gain_s
    gain_s = judged.before_s - after_s
    b.failed = b.failed + 1 if 2 * gain_s < predicted_s else 0
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


def repaired(s: State, now: float) -> None:
    """The first step after a repair is committed: what the repair took, but for noticing and waiting."""
    if s.incident is not None and s.policy.rebalance:
        took = now - s.incident.formed_at + s.incident.settled_at - s.incident.aborted_at
        b = balance_of(s)
        b.pause_s = max(0.0, took - _step_s(b))


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


def _step_s(b: Balance) -> float:
    """What a step takes at present; 0 if that is not known."""
    return median(b.steps_s) if b.steps_s else 0.0


def _situation(s: State, b: Balance, world: World, steps_left: int) -> Situation:
    layout = world.layout
    members = [s.roster.alive[w] for w in layout.members if w in s.roster.alive]
    spares = [info for w, info in sorted(s.roster.alive.items()) if w not in layout.places and w not in b.benched]
    infos = (*members, *spares)
    policy = s.policy
    return Situation(
        workers=infos,
        steps_left=steps_left,
        pause_s=b.pause_s,
        stage_fits=_room(s, layout),
        fits=lambda x: (
            _has_state(s, world, x) and fits(x, policy.model, _infos(s, x), policy.precision, _uses(s), policy.copies)
        ),
        without=lambda workers: _plan(s, workers, b.tracker.speeds()),
        min_gain=min(0.9, MIN_GAIN * 2**b.failed),
    )


def _has_state(s: State, world: World, layout: Layout) -> bool:
    """Whether those who stay keep all of the state between them: only members of a world move anything."""
    if set(layout.members) >= set(world.layout.members):
        return True
    kept = shards_in(world, s.policy.model)
    return not lost_slices(s.policy.model, (kept[w] for w in world.layout.members if w in layout.places))


# ---------------------------------------------------------------- when a world is formed


def plan(s: State, candidates: Sequence[WorkerInfo]) -> Planned | Infeasible:
    """The layout for these workers: the one that is wanted if all who have a place in it are here and there is none for
    more of them, else one by what is known of their speeds.

    Who was evicted is no candidate if there can be a world without, and if the others hold all of the state.
    """
    if not s.policy.rebalance:
        return plan_layout(candidates, s.policy.wish, s.policy.model, s.policy.micro_batches, s.layout)
    b = balance_of(s)
    speeds = b.tracker.speeds()
    out = b.benched if b.wanted is None else b.benched | set(b.wanted.out)
    if isinstance(s.mode, Gathering) and not _hold_all(s, [w.worker_id for w in candidates if w.worker_id not in out]):
        out = set()
    planned = _plan(s, [info for info in candidates if info.worker_id not in out], speeds)
    if isinstance(planned, Infeasible) and out:
        planned = _plan(s, candidates, speeds)
    here = {info.worker_id for info in candidates}
    wanted = b.wanted
    if wanted is None or isinstance(planned, Infeasible) or not here.issuperset(wanted.layout.members):
        return planned
    if len(planned.layout.members) > len(wanted.layout.members):
        return planned
    unused = tuple(info.worker_id for info in candidates if info.worker_id not in wanted.layout.places)
    return Planned(wanted.layout, wanted.reason, unused)


def _hold_all(s: State, workers: Sequence[WorkerId]) -> bool:
    """Whether these hold all of the committed version, as they have answered."""
    held = (held.shard for w in workers for held in s.holdings.get(w, ()) if held.version == s.committed)
    return s.committed == INITIAL or not lost_slices(s.policy.model, held)


def opened(s: State, world: World) -> None:
    """A world is to be formed, with the layout that was wanted or another one."""
    if not s.policy.rebalance:
        return
    b = balance_of(s)
    change, b.wanted, b.judged, b.lost_s = b.wanted, None, None, 0.0
    b.benched.difference_update(world.layout.members)  # there was no world without them, and so they count again
    if change is not None and change.layout == world.layout:
        b.benched.update(change.out)
        b.judged = Judged(change, _step_s(b))
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


def _plan(s: State, workers: Sequence[WorkerInfo], speeds: Speeds) -> Planned | Infeasible:
    policy = s.policy

    def planned(infos: Sequence[WorkerInfo]) -> Planned | Infeasible:
        return plan_layout(
            infos, policy.wish, policy.model, policy.micro_batches, s.layout, speeds, lambda layout: _room(s, layout)
        )

    found = planned(workers)
    if not speeds.kinds or isinstance(found, Infeasible):
        return found
    if policy.slowed and not s.holdings:
        found = planned(_as_slowed(workers, found.layout, policy.slowed))
        assert isinstance(found, Planned)
    new = s.layout is None and not speeds.paces
    return replace(found, reason=f"{found.reason}, as it was profiled") if new else found


def _as_slowed(workers: Sequence[WorkerInfo], layout: Layout, slowed: Sequence[tuple[int, float]]) -> list[WorkerInfo]:
    """In a world that nobody brings state into the ranks, which no speed changes, say who is made slow."""
    slow = {layout.members[rank]: factor for rank, factor in slowed if rank < len(layout.members)}
    return [
        replace(info, kind=slowed_kind(info.kind, slow[info.worker_id])) if info.worker_id in slow else info
        for info in workers
    ]


def _room(s: State, layout: Layout) -> Fits:
    return stage_fits(layout, s.policy.model, _infos(s, layout), s.policy.precision, s.policy.copies)


def _infos(s: State, layout: Layout) -> list[WorkerInfo]:
    return [s.roster.alive[worker] for worker in layout.members if worker in s.roster.alive]


def _uses(s: State) -> Uses:
    return Uses(s.policy.checkpoint_every is not None, s.policy.mirror_every > 0)
