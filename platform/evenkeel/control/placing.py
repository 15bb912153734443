"""Which layout those who are here get, with what each has the memory for."""

from collections.abc import Sequence
from dataclasses import replace

from evenkeel.control.modes import Gathering
from evenkeel.control.state import State, names
from evenkeel.core.ids import INITIAL, WorkerId
from evenkeel.core.layout import Layout, WorkerInfo, slowed_kind
from evenkeel.plan.coverage import lost_slices
from evenkeel.plan.layout import Infeasible, Planned, plan_layout
from evenkeel.plan.memory import stage_fits
from evenkeel.plan.speeds import Fits, Speeds


def plan(s: State, workers: Sequence[WorkerInfo], speeds: Speeds | None) -> Planned | Infeasible:
    """The layout for these; without those that have too little memory for what they would get, if there is one then.

    If there is none, or state would be lost with them, all are used: what the state takes is known, but of what else
    takes memory only that it is not more than so much (memory.FOR_STATE).
    """
    planned = _by_profile(s, workers, speeds)
    if isinstance(planned, Infeasible) or planned.fits:
        return planned
    small = _too_small(s, planned.layout)
    rest = [info for info in workers if info.worker_id not in small]
    if isinstance(s.mode, Gathering) and not hold_all(s, [info.worker_id for info in rest]):
        return planned
    without = plan(s, rest, speeds)
    if isinstance(without, Infeasible) or not without.fits:
        return planned
    reason = f"{without.reason}; too little memory: {names(sorted(small))}"
    return Planned(without.layout, reason, (*without.unused, *sorted(small)))


def _by_profile(s: State, workers: Sequence[WorkerInfo], speeds: Speeds | None) -> Planned | Infeasible:
    """In a world that nobody brings state into, ranks, which no speed changes, say who is made slow (emulation)."""
    planned = _planned(s, workers, speeds)
    if speeds is None or not speeds.kinds or isinstance(planned, Infeasible):
        return planned
    members = planned.layout.members
    slow = {members[rank]: factor for rank, factor in s.policy.slowed if rank < len(members)}
    if slow and not s.holdings:
        marked = [_as_slowed(info, slow.get(info.worker_id, 1.0)) for info in workers]
        planned = _planned(s, marked, speeds)
        assert isinstance(planned, Planned)
    by_profile_alone = s.layout is None and not speeds.paces
    return replace(planned, reason=f"{planned.reason}, as it was profiled") if by_profile_alone else planned


def _as_slowed(info: WorkerInfo, factor: float) -> WorkerInfo:
    return replace(info, kind=slowed_kind(info.kind, factor)) if factor > 1 else info


def _planned(s: State, workers: Sequence[WorkerInfo], speeds: Speeds | None) -> Planned | Infeasible:
    policy = s.policy
    return plan_layout(
        workers, policy.wish, policy.model, policy.micro_batches, s.layout, speeds, lambda layout: room(s, layout)
    )


def hold_all(s: State, workers: Sequence[WorkerId]) -> bool:
    """Whether these hold all of the committed version, as they have answered."""
    held = (held.shard for w in workers for held in s.holdings.get(w, ()) if held.version == s.committed)
    return s.committed == INITIAL or not lost_slices(s.policy.model, held)


def room(s: State, layout: Layout) -> Fits:
    """Which layers the members' memory has room for, where they are in the layout."""
    return stage_fits(layout, s.policy.model, infos(s, layout), s.policy.precision, s.policy.copies)


def infos(s: State, layout: Layout) -> list[WorkerInfo]:
    """Of the members that are alive."""
    return [s.roster.alive[worker] for worker in layout.members if worker in s.roster.alive]


def _too_small(s: State, layout: Layout) -> set[WorkerId]:
    """Members of stages that have no room for their layers."""
    fits = room(s, layout)
    return {
        worker
        for i, pipeline in enumerate(layout.pipelines)
        for j, stage in enumerate(pipeline.stages)
        if not fits(i, j, stage.start, stage.stop)
        for worker in stage.members
    }
