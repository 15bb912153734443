"""What `evenkeel plan` prints: the layout as a picture in text, times, memory, alternatives; or all of it as JSON."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from textwrap import wrap
from typing import Any

from rich.console import Console

from evenkeel.config import Config
from evenkeel.plan.hardware import Cluster, NodeKind
from evenkeel.plan.layout import Infeasible
from evenkeel.plan.plans import PipelinePlan, Plan, StagePlan
from evenkeel.plan.workload import Workload
from evenkeel.tools.devices import Catalogue
from evenkeel.tools.drawing import bar, boxes
from evenkeel.tools.text import print_table

MOST_CLASSES = 8
"""Of equal pipelines; what a plan has more of is only counted."""
GIB = 2**30
BAR_WIDTH = 8


@dataclass(frozen=True, slots=True)
class Answer:
    """A plan, and what it is compared with.

    Attributes:
        memory: the part of a device's memory that was planned with.
        others: plans of other TP degrees, or why there are none.
        even: equal pipelines with equal shares; None: not asked for.
    """

    config: Config
    cluster: Cluster
    work: Workload
    memory: float
    plan: Plan
    others: Mapping[int, Plan | Infeasible]
    even: Plan | Infeasible | None


def show(answer: Answer, known: Catalogue, console: Console) -> None:
    """Prints everything for people."""
    plan = answer.plan
    _lines(console, heading(answer, known))
    _say(console, "", f"a step takes {seconds(plan.step_s)}, {plan.tokens_per_s:,.0f} tokens/s")
    for pipeline in plan.pipelines[:MOST_CLASSES]:
        _say(console, "", pipeline_line(pipeline, plan))
        _say(
            console,
            *boxes([stage_lines(pipeline, s, answer, known) for s in range(len(pipeline.stages))], console.width),
        )
    if len(plan.pipelines) > MOST_CLASSES:
        _say(console, "", f"and {len(plan.pipelines) - MOST_CLASSES} more kinds of pipeline; --json has them all")
    _say(console, "", "Why")
    for line in plan.reason:
        _lines(console, [line], "  - ")
    _say(console, "", "Memory of each device, where it is fullest")
    print_table(MEMORY_HEAD, list(memory_rows(answer, known)), MEMORY_HEAD[1:])
    if answer.others:
        _say(console, "", "Other TP degrees")
        print_table(
            OTHER_HEAD, [other_row(t, other, plan) for t, other in sorted(answer.others.items())], OTHER_HEAD[:3]
        )
    if answer.even is not None:
        _say(console, "", "Beside equal pipelines with equal shares")
        _compare(answer, answer.even, console)


def _say(console: Console, *lines: str) -> None:
    for line in lines:
        console.print(line, markup=False, soft_wrap=True)


def _lines(console: Console, lines: Sequence[str], mark: str = "") -> None:
    after = " " * (len(mark) or 2)
    for line in lines:
        width = max(40, console.width)
        folded = wrap(line, width, initial_indent=mark, subsequent_indent=after, break_on_hyphens=False)
        _say(console, *folded)


# ---------------------------------------------------------------- the picture


def heading(answer: Answer, known: Catalogue) -> list[str]:
    """What was planned, and for what."""
    work, config = answer.work, answer.config
    parameters = sum(layer.params for layer in work.layers)
    nodes = ", ".join(f"{count} x {kind.devices} {short(kind, known)}" for kind, count in answer.cluster.nodes)
    return [
        f"{config.model.name}: {parameters:,} parameters in {len(work.layers)} layers, {work.precision}; a step is "
        f"{config.train.micro_batches:,} micro-batches of {work.tokens:,} tokens",
        f"on {answer.cluster.devices:,} devices: {nodes}",
    ]


def pipeline_line(pipeline: PipelinePlan, plan: Plan) -> str:
    """How many of them there are, and what each does: "2 pipelines, each 40 of 100 micro-batches, done after 3.1 s"."""
    many = f"{pipeline.count:,} equal pipelines, each" if pipeline.count > 1 else "1 pipeline:"
    return f"{many} {pipeline.share:,} of {plan.micro_batches:,} micro-batches, done after {seconds(pipeline.finish_s)}"


def stage_lines(pipeline: PipelinePlan, index: int, answer: Answer, known: Catalogue) -> list[str]:
    """What stands in a stage's box; the upper bar is its time beside the slowest's, the lower its memory."""
    stage, tensor = pipeline.stages[index], answer.plan.tensor
    slowest_s = pipeline.stages[pipeline.slowest].time.total_s
    start, stop = stage.layers
    limit = answer.memory * stage.node.device.memory
    layers = f"layer {start}" if stop == start + 1 else f"layers {start}-{stop - 1}"
    return [
        f"{tensor} x {short(stage.node, known)}" if tensor > 1 else short(stage.node, known),
        layers,
        f"{bar(stage.time.total_s / slowest_s if slowest_s else 0, BAR_WIDTH)} {seconds(stage.time.total_s)}",
        f"{bar(stage.memory.total / limit, BAR_WIDTH)} {stage.memory.total / GIB:.1f} GiB",
    ]


def short(node: NodeKind, known: Catalogue) -> str:
    """The first alias of a node's device, or its name."""
    table = next((t for t in known.tables if t.name == node.device.name), None)
    return table.aliases[0] if table is not None and table.aliases else node.device.name


def seconds(time_s: float) -> str:
    """Three digits, in the unit that suits: "12.3 ms"."""
    if time_s >= 1 or time_s == 0:
        return f"{time_s:,.3g} s" if time_s < 1000 else f"{time_s:,.0f} s"
    return f"{1e3 * time_s:.3g} ms" if time_s >= 1e-3 else f"{1e6 * time_s:.3g} µs"


# ---------------------------------------------------------------- tables

MEMORY_HEAD = ("device", "parameters", "gradients", "optimizer", "activations", "together", "of", "limit")


def memory_rows(answer: Answer, known: Catalogue) -> Iterator[list[str]]:
    """For each kind of device that is used."""
    fullest: dict[str, StagePlan] = {}
    for stage in (s for p in answer.plan.pipelines for s in p.stages):
        name = stage.node.device.name
        if name not in fullest or stage.memory.total > fullest[name].memory.total:
            fullest[name] = stage
    for stage in fullest.values():
        memory, limit = stage.memory, answer.memory * stage.node.device.memory
        parts = (memory.params, memory.grads, memory.optimizer, memory.activations, memory.total)
        yield [
            short(stage.node, known),
            *(f"{part / GIB:.1f}" for part in parts),
            f"{limit / GIB:.1f} GiB",
            f"{memory.total / limit:.0%}",
        ]


OTHER_HEAD = ("TP", "step", "longer", "why")


def other_row(tensor: int, other: Plan | Infeasible, best: Plan) -> list[str]:
    """A TP degree that was not chosen, and why."""
    if isinstance(other, Infeasible):
        short = f"does not fit: each device lacks {other.short_bytes / GIB:.3g} GiB"
        return [str(tensor), "-", "-", short if other.short_bytes else other.reason]
    return [str(tensor), seconds(other.step_s), f"{other.step_s / best.step_s - 1:.1%}", why_longer(other, best)]


def why_longer(other: Plan, best: Plan) -> str:
    """The part of the step that is longer by most: of the pipeline that is done last."""
    theirs, ours = _parts(other), _parts(best)
    what = max(theirs, key=lambda name: theirs[name] - ours[name])
    if theirs[what] <= ours[what]:
        return "no part of the step is longer"
    return f"{seconds(theirs[what] - ours[what])} more {what}"


def _parts(plan: Plan) -> dict[str, float]:
    last = max(plan.pipelines, key=lambda p: p.finish_s)
    busy_s = last.share * last.stages[last.slowest].time.total_s
    return {
        "in the slowest stage": busy_s,
        "to fill and drain the pipeline": last.compute_s - busy_s,
        "to update": last.update_s,
        "to sum gradients": plan.sum_s,
    }


def _compare(answer: Answer, even: Plan | Infeasible, console: Console) -> None:
    if isinstance(even, Infeasible):
        _lines(console, [f"there is no such layout: {even.reason}"])
        return
    print_table(("", "planned", "uniform"), comparison(answer.plan, even), ("planned", "uniform"))
    gain = f"{even.step_s / answer.plan.step_s:.3g}"
    equal = "planned and uniform are equally fast"
    _say(console, equal if gain == "1" else f"planned is {gain} times as fast as uniform")


def comparison(plan: Plan, even: Plan) -> list[list[str]]:
    """Side by side."""
    both = (plan, even)
    return [
        ["step", *(seconds(p.step_s) for p in both)],
        ["tokens/s", *(f"{p.tokens_per_s:,.0f}" for p in both)],
        ["TP", *(str(p.tensor) for p in both)],
        ["pipelines", *(f"{p.data:,}" for p in both)],
        ["stages", *(_stages(p) for p in both)],
        ["copies of the optimizer state", *(str(p.copies) for p in both)],
        ["idle devices", *(f"{sum(i.devices for i in p.idle):,}" for p in both)],
    ]


def _stages(plan: Plan) -> str:
    depths = sorted({len(p.stages) for p in plan.pipelines})
    return str(depths[0]) if len(depths) == 1 else f"{depths[0]} to {depths[-1]}"


# ---------------------------------------------------------------- JSON


def record(answer: Answer) -> dict[str, Any]:
    """Everything, for programs: seconds, bytes, tokens."""
    work = answer.work
    even = answer.even
    return {
        "model": answer.config.model.name,
        "parameters": sum(layer.params for layer in work.layers),
        "layers": len(work.layers),
        "precision": work.precision,
        "micro_batches": answer.config.train.micro_batches,
        "tokens": work.tokens,
        "cluster": [
            {"device": kind.device.name, "devices": kind.devices, "nodes": count}
            for kind, count in answer.cluster.nodes
        ],
        "memory": answer.memory,
        "plan": plan_record(answer.plan),
        "others": {str(tensor): _other_record(other) for tensor, other in answer.others.items()},
        "uniform": None if even is None else _other_record(even),
    }


def _other_record(other: Plan | Infeasible) -> dict[str, Any]:
    return {"infeasible": other.reason} if isinstance(other, Infeasible) else plan_record(other)


def plan_record(plan: Plan) -> dict[str, Any]:
    return {
        "step_s": plan.step_s,
        "tokens_per_s": plan.tokens_per_s,
        "bound_s": plan.bound_s,
        "sum_s": plan.sum_s,
        "tensor": plan.tensor,
        "copies": plan.copies,
        "pipelines": [
            {
                "count": pipeline.count,
                "share": pipeline.share,
                "compute_s": pipeline.compute_s,
                "update_s": pipeline.update_s,
                "stages": [_stage_record(stage) for stage in pipeline.stages],
            }
            for pipeline in plan.pipelines
        ],
        "idle": [{"device": i.node.device.name, "devices": i.devices, "reason": i.reason} for i in plan.idle],
        "reason": list(plan.reason),
    }


def _stage_record(stage: StagePlan) -> dict[str, Any]:
    return {
        "device": stage.node.device.name,
        "layers": list(stage.layers),
        "forward_s": stage.time.forward_s,
        "backward_s": stage.time.backward_s,
        "memory": {**asdict(stage.memory), "total": stage.memory.total},
    }
