"""How fast the workers of a run are, as they were measured, and what that makes of a layout's step."""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from statistics import mean
from typing import Self

from evenkeel.core.ids import WorkerId
from evenkeel.core.layout import Layout, Pipeline, Stage, WorkerInfo
from evenkeel.plan.batch import shares, slowest_finish
from evenkeel.plan.recut import recut
from evenkeel.plan.workload import Profile

MIN_GAIN = 0.1
"""The least part of the time of a step's passes that a change must win: far above what chance makes of equals."""

Fits = Callable[[int, int, int, int], bool]
"""Whether stage j of pipeline i has the memory for layers start to stop; see memory.stage_fits."""

HARDLY = 0.98
"""Of the time of a pipeline's slowest stage: to gain less than the rest is not worth moving a layer."""


@dataclass(frozen=True, slots=True)
class Speeds:
    """What was measured of the workers.

    Attributes:
        costs: of each layer, in units that are the same for all workers.
        paces: seconds that a worker takes for a unit of cost, forward and backward, for one micro-batch.
        receives: seconds per micro-batch that the messages of neighbouring stages take to come in: a slow link bounds a
            pipeline as a slow stage does, and no cut makes it faster.
        kinds: paces of kinds of device, as a profile has them: before anything is measured in training.
    """

    costs: tuple[float, ...]
    paces: Mapping[WorkerId, float] = field(default_factory=dict)
    receives: Mapping[WorkerId, float] = field(default_factory=dict)
    kinds: Mapping[str, float] = field(default_factory=dict)

    @classmethod
    def profiled(cls, profile: Profile, tensor: int) -> Self | None:
        """What a profile says at this TP degree; None if nothing. A unit of cost is the whole model.

        A layer's cost is its part of the model's time, the mean over the kinds of device.
        """
        times = {
            kind: [layer.total_s for layer in layers]
            for (kind, degree), layers in profile.layers.items()
            if degree == tensor
        }
        kinds = {kind: sum(layers) for kind, layers in times.items() if sum(layers) > 0}
        if not kinds:
            return None
        parts = [[seconds / kinds[kind] for seconds in times[kind]] for kind in kinds]
        return cls(tuple(map(mean, zip(*parts, strict=True))), kinds=kinds)

    def for_all(self, workers: Sequence[WorkerInfo]) -> "Speeds":
        """With a pace for each of these: who was not measured has the mean one of its kind of device.

        Where nobody of its kind was measured it has what the profile says of that, times what those who were take of
        what it says of theirs, as in training a pass may take longer; else the mean of all.
        """
        by_kind: dict[str, list[float]] = defaultdict(list)
        for info in workers:
            if info.worker_id in self.paces:
                by_kind[info.kind].append(self.paces[info.worker_id])
        measured = {kind: mean(paces) for kind, paces in by_kind.items()}
        longer = [pace / self.kinds[kind] for kind, pace in measured.items() if kind in self.kinds]
        kinds = {kind: pace * (mean(longer) if longer else 1.0) for kind, pace in self.kinds.items()} | measured
        known = [pace for paces in by_kind.values() for pace in paces]
        known = known or [kinds[info.kind] for info in workers if info.kind in kinds] or [1.0]
        guess = {info.worker_id: kinds.get(info.kind, mean(known)) for info in workers}
        return replace(self, paces={**guess, **self.paces})

    def stage_pace(self, stage: Stage) -> float:
        """A TP group is as fast as its slowest member."""
        return max(self.paces[worker] for worker in stage.members)

    def stage_s(self, stage: Stage) -> float:
        """Seconds of the stage's passes over one micro-batch."""
        return self.stage_pace(stage) * sum(self.costs[stage.start : stage.stop])

    def slowest_s(self, pipeline: Pipeline) -> float:
        """Seconds from one micro-batch to the next where the pipeline is slowest: a stage, or a link into one."""
        links = (self.receives.get(worker, 0.0) for stage in pipeline.stages for worker in stage.members)
        return max(*(self.stage_s(stage) for stage in pipeline.stages), *links)

    def bubble_s(self, pipeline: Pipeline) -> float:
        """Seconds in which a pipeline fills and drains; see batch.shares."""
        return max(0.0, sum(self.stage_s(stage) for stage in pipeline.stages) - self.slowest_s(pipeline))

    def finish_s(self, layout: Layout) -> float:
        """Seconds until the last pipeline has done its share of a step."""
        pipelines = layout.pipelines
        return slowest_finish(
            [self.slowest_s(p) for p in pipelines], [p.share for p in pipelines], [self.bubble_s(p) for p in pipelines]
        )

    def shared(self, layout: Layout) -> Layout:
        """The layout with the shares under which it finishes first, of at least one micro-batch each."""
        pipelines = layout.pipelines
        times, bubbles = [self.slowest_s(p) for p in pipelines], [self.bubble_s(p) for p in pipelines]
        return with_shares(layout, shares(times, layout.micro_batches, 1, bubbles))


def with_shares(layout: Layout, counts: Sequence[int]) -> Layout:
    """The layout with other shares."""
    pipelines: list[Pipeline] = []
    micro = 0
    for pipeline, count in zip(layout.pipelines, counts, strict=True):
        pipelines.append(replace(pipeline, micro_start=micro, micro_stop=micro + count))
        micro += count
    return Layout(tuple(pipelines))


def anything(pipeline: int, stage: int, start: int, stop: int) -> bool:
    """Where memory does not matter."""
    return True


def all_fit(layout: Layout, fits: Fits) -> bool:
    """Whether every stage has the memory for its layers."""
    return all(
        fits(i, j, stage.start, stage.stop)
        for i, pipeline in enumerate(layout.pipelines)
        for j, stage in enumerate(pipeline.stages)
    )


def recut_by(layout: Layout, speeds: Speeds, fits: Fits = anything) -> Layout:
    """The layout with the layers of each pipeline cut again for its workers' speeds, and the best shares for that.

    Who is grouped with whom stays. A pipeline whose slowest stage would hardly gain keeps its cuts, if these fit; one
    that fits in no way keeps them, too.

    Args:
        fits: see memory.stage_fits.
    """
    pipelines = [_recut(pipeline, speeds, partial(fits, i)) for i, pipeline in enumerate(layout.pipelines)]
    return speeds.shared(Layout(tuple(pipelines)))


def _recut(pipeline: Pipeline, speeds: Speeds, fits: Callable[[int, int, int], bool]) -> Pipeline:
    now = tuple((stage.start, stage.stop) for stage in pipeline.stages)
    cuts = recut(speeds.costs, [speeds.stage_pace(stage) for stage in pipeline.stages], now, fits, HARDLY)
    if cuts is None or cuts == now:
        return pipeline
    stages = tuple(Stage(*layers, stage.members) for layers, stage in zip(cuts, pipeline.stages, strict=True))
    after = replace(pipeline, stages=stages)
    must = not all(fits(j, *layers) for j, layers in enumerate(now))
    return after if must or speeds.slowest_s(after) < speeds.slowest_s(pipeline) else pipeline
