"""From a plan, which counts, to a layout, which names: who of the workers that are here takes which place."""

from collections import Counter
from collections.abc import Container, Sequence

from evenkeel.core.ids import WorkerId
from evenkeel.core.layout import Layout, Pipeline, Stage, WorkerInfo
from evenkeel.core.model import ModelShape
from evenkeel.plan.assign import Range, Seat, assign
from evenkeel.plan.layout import Infeasible
from evenkeel.plan.plans import PipelinePlan, Plan
from evenkeel.plan.units import Unit, form_units


def seat(plan: Plan, workers: Sequence[WorkerInfo], model: ModelShape, previous: Layout | None) -> Layout | Infeasible:
    """The plan's layout.

    A place is for a device of the kind that the plan says, whatever its node: layers and memory depend on that alone.
    A pipeline of `previous` that the plan has, too (same cuts on the same kinds of device) keeps its index, and who has
    a place in it keeps that; the others are assigned as in plan/assign.py. The result depends on nothing but the
    arguments: every worker comes to the same.

    Args:
        workers: who is ready, in order of preference; each says its kind of device as the plan names it.
        previous: the layout to stay close to; of its members only those in `workers` are alive.
    """
    pipelines = _ordered(plan, {worker.worker_id: worker.kind for worker in workers}, previous)
    seats: dict[str, dict[Seat, Range]] = {}
    for i, pipeline in enumerate(pipelines):
        for s, stage in enumerate(pipeline.stages):
            seats.setdefault(stage.node.device.name, {})[i, s] = stage.layers
    taken: dict[Seat, tuple[WorkerId, ...]] = {}
    for kind, places in seats.items():
        units = form_units([worker for worker in workers if worker.kind == kind], plan.tensor, previous)
        if len(units) < len(places):
            return Infeasible(
                f"the plan has {len(places)} places for TP groups of {plan.tensor} {kind}, and the workers that are "
                f"here form {len(units)}"
            )
        taken |= assign(_those_at_home_first(units, places)[: len(places)], places, model, previous)
    return _layout(pipelines, taken)


def _ordered(plan: Plan, kind_of: dict[WorkerId, str], previous: Layout | None) -> list[PipelinePlan]:
    """All pipelines one by one: where the previous layout had one like it, then the rest where there is room."""
    left = Counter({c: pipeline.count for c, pipeline in enumerate(plan.pipelines)})
    order: list[int | None] = [None] * plan.data
    before = previous.pipelines[: plan.data] if previous else ()
    # Those with the same share first: the others of a class may be like it in all but that.
    for same_share in (True, False):
        for i, pipeline in enumerate(before):
            likes = (c for c in left if left[c] and _is_like(pipeline, plan.pipelines[c], kind_of, same_share))
            if order[i] is None and (c := next(likes, None)) is not None:
                order[i] = c
                left[c] -= 1
    rest = left.elements()
    return [plan.pipelines[next(rest) if c is None else c] for c in order]


def _is_like(pipeline: Pipeline, wanted: PipelinePlan, kind_of: dict[WorkerId, str], same_share: bool) -> bool:
    """Whether it has the same cuts, and its members that are still here are of the same kinds."""
    cuts = [(stage.start, stage.stop) for stage in pipeline.stages]
    if cuts != [stage.layers for stage in wanted.stages] or (same_share and pipeline.share != wanted.share):
        return False
    return all(
        kind_of.get(worker, new.node.device.name) == new.node.device.name
        for old, new in zip(pipeline.stages, wanted.stages, strict=True)
        for worker in old.members
    )


def _those_at_home_first(units: Sequence[Unit], seats: Container[Seat | None]) -> list[Unit]:
    return sorted(units, key=lambda unit: unit.home not in seats)


def _layout(pipelines: Sequence[PipelinePlan], taken: dict[Seat, tuple[WorkerId, ...]]) -> Layout:
    built: list[Pipeline] = []
    micro = 0
    for i, pipeline in enumerate(pipelines):
        stages = tuple(Stage(*stage.layers, taken[i, s]) for s, stage in enumerate(pipeline.stages))
        built.append(Pipeline(stages, micro, micro + pipeline.share))
        micro += pipeline.share
    return Layout(tuple(built))
