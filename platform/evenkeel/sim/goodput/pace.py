"""How long a step takes in a layout, and what workers measure of it."""

from collections.abc import Sequence
from functools import lru_cache

from evenkeel.core.ids import NodeId, WorkerId
from evenkeel.core.layout import Layout, WorkerInfo
from evenkeel.core.model import ModelShape
from evenkeel.core.vote import Timing
from evenkeel.core.world import World
from evenkeel.plan import timing
from evenkeel.plan.batch import shares
from evenkeel.plan.cuts import Cuts, slowest_stage, stage_cuts
from evenkeel.plan.layout import Infeasible, plan_layout
from evenkeel.plan.speeds import Speeds
from evenkeel.sim.goodput.setting import Setting


class Pace:
    """Seconds of a step: as the setting says, or those at full strength, longer as the slowest pipeline is.

    A pipeline takes its bubble, and its share at the pace of its slowest stage (plan/batch.py). Where devices differ,
    full strength is the planner's layout for all nodes but the spares, with shares and cuts by their speed.

    Raises:
        ValueError: if there is no layout at full strength.
    """

    def __init__(self, setting: Setting) -> None:
        self._setting = setting
        self._costs = _costs(setting.model)
        self._full = self._finish(*_full_strength(setting, self._costs)) if setting.slower else self._of_equals()

    def step_s(self, world: World) -> float:
        if self._setting.pace is not None:
            return self._setting.pace(world.layout)
        return self.of(world.layout, world.members)

    def of(self, layout: Layout, members: Sequence[WorkerInfo]) -> float:
        """By the shares and the slowest stages alone."""
        return self._setting.step_s * self._finish(layout, members) / self._full

    def timings(self, world: World, step: int) -> tuple[Timing, ...]:
        """What everybody tells with the vote of this step, if it is one that tells."""
        if not timing.due(world, step):
            return ()
        slower, of_cost_s = self._setting.slower, self._setting.step_s / self._full
        kinds = {info.worker_id: info.kind for info in world.members}
        found = []
        for worker, shard in world.layout.shards.items():
            layers = [slower[kinds[worker]] * of_cost_s * cost for cost in self._costs[shard.start : shard.stop]]
            found.append(Timing(worker, sum(layers), layers=tuple(layers)))
        return tuple(found)

    def _of_equals(self) -> float:
        """All pipelines of full depth, the first with the largest share."""
        setting = self._setting
        cuts = stage_cuts(self._costs, min(setting.pipeline, setting.model.depth))
        most = shares([slowest_stage(self._costs, cuts)] * setting.data, setting.micro_batches)[0]
        return _finish(self._costs, cuts, (1.0,) * len(cuts), most)

    def _finish(self, layout: Layout, members: Sequence[WorkerInfo]) -> float:
        """In units of cost, on the fastest devices."""
        slower = self._setting.slower
        paces = {info.worker_id: slower[info.kind] for info in members} if slower else {}
        alike = {
            (
                tuple((stage.start, stage.stop) for stage in pipeline.stages),
                tuple(max(paces.get(w, 1.0) for w in stage.members) for stage in pipeline.stages),
                pipeline.share,
            )
            for pipeline in layout.pipelines
        }
        return max(_finish(self._costs, *one) for one in alike)


@lru_cache(maxsize=1024)
def _finish(costs: Sequence[float], cuts: Cuts, paces: Sequence[float], share: int) -> float:
    stages = [pace * sum(costs[start:stop]) for (start, stop), pace in zip(cuts, paces, strict=True)]
    return sum(stages) - max(stages) + share * max(stages)


def _full_strength(setting: Setting, costs: tuple[float, ...]) -> tuple[Layout, list[WorkerInfo]]:
    """The layout that the planner has for all nodes but the spares, and who is in it."""
    policy = setting.policy
    places = [setting.nodes[i // setting.slots] for i in range(policy.wish.max_workers)]
    workers = [WorkerInfo(WorkerId(f"{i}"), NodeId(n), i, kind=setting.kinds[n]) for i, n in enumerate(places)]
    speeds = Speeds(costs, {worker.worker_id: setting.slower[worker.kind] for worker in workers})
    planned = plan_layout(workers, policy.wish, policy.model, policy.micro_batches, None, speeds)
    if isinstance(planned, Infeasible):
        raise ValueError(f"no layout at full strength: {planned.reason}")
    return planned.layout, workers


def _costs(model: ModelShape) -> tuple[float, ...]:
    costs = tuple(layer.cost for layer in model.layers)
    return costs if any(costs) else (1.0,) * len(costs)
