"""How long a step takes in a layout."""

from collections.abc import Sequence
from functools import lru_cache

from evenkeel.core.layout import Layout
from evenkeel.core.model import ModelShape
from evenkeel.plan.batch import shares
from evenkeel.plan.cuts import Cuts, slowest_stage, stage_cuts
from evenkeel.sim.goodput.setting import Setting


class Pace:
    """Seconds of a step: as the setting says, or those at full strength, longer as the slowest pipeline is.

    A pipeline takes its bubble, and its share at the pace of its slowest stage (plan/batch.py).
    """

    def __init__(self, setting: Setting) -> None:
        self._setting = setting
        self._costs = _costs(setting.model)
        cut = stage_cuts(self._costs, min(setting.pipeline, setting.model.depth))
        slowest = slowest_stage(self._costs, cut)
        most = shares([slowest] * setting.data, setting.micro_batches)[0]
        self._full = self._finish(cut, most)

    def step_s(self, layout: Layout) -> float:
        if self._setting.pace is not None:
            return self._setting.pace(layout)
        kinds = {(tuple((s.start, s.stop) for s in p.stages), p.share) for p in layout.pipelines}
        return self._setting.step_s * max(self._finish(cut, share) for cut, share in kinds) / self._full

    def _finish(self, cut: Cuts, share: int) -> float:
        return _finish(self._costs, cut, share)


@lru_cache(maxsize=1024)
def _finish(costs: Sequence[float], cut: Cuts, share: int) -> float:
    slowest = slowest_stage(costs, cut)
    return max(0.0, sum(costs) - slowest) + share * slowest


def _costs(model: ModelShape) -> tuple[float, ...]:
    costs = tuple(layer.cost for layer in model.layers)
    return costs if any(costs) else (1.0,) * len(costs)
