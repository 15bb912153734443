"""What the planner answers with: a plan as classes of equal pipelines, small for any number of devices."""

from dataclasses import dataclass

from evenkeel.plan.cost import StageMemory
from evenkeel.plan.hardware import NodeKind
from evenkeel.plan.pipelines import pipeline_s
from evenkeel.plan.workload import LayerTime


@dataclass(frozen=True, slots=True)
class StagePlan:
    """One stage: a TP group on a node of this kind.

    Attributes:
        layers: (start, stop).
        time: of one micro-batch, with what is sent to the neighbouring stages.
        memory: on each device, with the activations that 1F1B keeps.
    """

    node: NodeKind
    layers: tuple[int, int]
    time: LayerTime
    memory: StageMemory


@dataclass(frozen=True, slots=True)
class PipelinePlan:
    """`count` equal pipelines.

    Attributes:
        share: micro-batches of each of them.
        compute_s: from its first forward to its last backward pass: plan/pipelines.py, fill_and_pace_s.
        update_s: of the optimizer.
    """

    count: int
    share: int
    stages: tuple[StagePlan, ...]
    compute_s: float
    update_s: float

    @property
    def finish_s(self) -> float:
        """From one sum of gradients to the next."""
        return self.compute_s + self.update_s

    @property
    def expected_s(self) -> float:
        """The same by the exact time of 1F1B, which is never longer."""
        return pipeline_s([stage.time for stage in self.stages], self.share) + self.update_s

    @property
    def slowest(self) -> int:
        """Index of the stage that sets the pace."""
        return max(range(len(self.stages)), key=lambda s: self.stages[s].time.total_s)


@dataclass(frozen=True, slots=True)
class Idle:
    """Devices of one kind of node that have no place, and why."""

    node: NodeKind
    devices: int
    reason: str


@dataclass(frozen=True, slots=True)
class Plan:
    """Who computes what.

    Attributes:
        tensor: TP degree, of all pipelines.
        pipelines: classes of equal ones; each has at least one micro-batch.
        copies: r, how many pipelines keep and update each slice of the optimizer state.
        sum_s: the slowest sum of gradients over the pipelines, for which all wait.
        step_s: seconds of a step: until the last pipeline is done, and that sum.
        bound_s: no plan is faster of those that docs/planning.md names.
        tokens_per_s: of the whole step.
        reason: what bounds it, what each kind of device is used for, what is idle and why; one line each.
    """

    tensor: int
    pipelines: tuple[PipelinePlan, ...]
    copies: int
    sum_s: float
    step_s: float
    bound_s: float
    tokens_per_s: float
    idle: tuple[Idle, ...]
    reason: tuple[str, ...] = ()

    @property
    def data(self) -> int:
        """How many pipelines there are."""
        return sum(pipeline.count for pipeline in self.pipelines)

    @property
    def micro_batches(self) -> int:
        return sum(pipeline.count * pipeline.share for pipeline in self.pipelines)

    @property
    def devices(self) -> int:
        """Those that have a place."""
        return self.tensor * sum(pipeline.count * len(pipeline.stages) for pipeline in self.pipelines)

    @property
    def expected_s(self) -> float:
        """Seconds of a step by the exact time of 1F1B: step_s is never below it, and simpler to plan by."""
        return max(pipeline.expected_s for pipeline in self.pipelines) + self.sum_s

    @property
    def gap(self) -> float:
        """By what part the step may be longer than the best; 0 if this is the best."""
        return self.step_s / self.bound_s - 1


def explain(plan: Plan) -> tuple[str, ...]:
    """The plan in words and numbers."""
    last = max(plan.pipelines, key=lambda p: p.finish_s)
    slow = last.stages[last.slowest]
    start, stop = slow.layers
    busy_s = last.share * slow.time.total_s
    ramp_s = last.compute_s - busy_s if len(last.stages) > 1 else 0.0
    lines = [
        f"a step takes {plan.step_s:.4g} s: {busy_s:.4g} s for {_count(last.share, 'micro-batch', 'es')} of "
        f"{slow.time.total_s:.4g} s in the slowest stage (stage {last.slowest} of {len(last.stages)}, layers {start} "
        f"to {stop - 1} on {slow.node.device.name}), {ramp_s:.4g} s to fill and drain the pipeline, "
        f"{last.update_s:.4g} s to update, {plan.sum_s:.4g} s to sum gradients over {_count(plan.data, 'pipeline')}",
        f"{_count(plan.data, 'pipeline')}, TP {plan.tensor}, the optimizer state in "
        f"{_count(plan.copies, 'copy', 'copies')}; "
        + ("no plan that was looked at is better" if plan.gap <= 0 else f"at most {plan.gap:.2%} above the best"),
    ]
    return (*lines, *_uses(plan), *(_idle(idle) for idle in plan.idle))


def _uses(plan: Plan) -> list[str]:
    """A line for each kind of node that is used."""
    nodes = list(dict.fromkeys(stage.node for p in plan.pipelines for stage in p.stages))
    lines = []
    for node in nodes:
        mine = [(p, [s for s in p.stages if s.node == node]) for p in plan.pipelines]
        devices = plan.tensor * sum(p.count * len(stages) for p, stages in mine)
        work = sum(p.count * p.share * s.time.total_s for p, stages in mine for s in stages)
        busy = work / (devices / plan.tensor * plan.step_s)
        full = max(s.memory.total / node.device.memory for _, stages in mine for s in stages)
        lengths = sorted({s.layers[1] - s.layers[0] for _, stages in mine for s in stages})
        layers = f"{lengths[0]}" if len(lengths) == 1 else f"{lengths[0]} to {lengths[-1]}"
        alone = sum(p.count for p, stages in mine if len(stages) == len(p.stages))
        among = sum(p.count for p, stages in mine if 0 < len(stages) < len(p.stages))
        where = [_count(alone, "pipeline") + " of its own"] * bool(alone) + [f"{among} with others"] * bool(among)
        lines.append(
            f"{_count(devices, 'device')} {node.device.name}: {layers} layers each, in {' and '.join(where)}; busy "
            f"{busy:.0%} of the step, memory at most {full:.0%} full"
        )
    return lines


def _idle(idle: Idle) -> str:
    return f"{_count(idle.devices, 'device')} {idle.node.device.name} idle: {idle.reason}"


def _count(n: int, word: str, plural: str = "") -> str:
    if plural and not plural.startswith("e"):
        return f"{n} {word if n == 1 else plural}"
    return f"{n} {word}" if n == 1 else f"{n} {word}{plural or 's'}"
