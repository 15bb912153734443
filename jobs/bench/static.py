"""The engine alone: the work in a fixed layout, without controller, heartbeat and Ray.

    python jobs/bench/static.py work.yaml OUTPUT [MEASURE ...] [--shares 20,10] [--cuts 3,6]

MEASURE is what bench/probe.py is to measure inside the workers.
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate, pairwise
from pathlib import Path

from bench.probe import Probed
from evenkeel.config import load_config
from evenkeel.control.policy import Policy
from evenkeel.core.ids import NodeId, WorkerId
from evenkeel.core.layout import Layout, Pipeline, WorkerInfo, check_layout
from evenkeel.engine.local import run_static
from evenkeel.plan.layout import Infeasible, plan_layout
from evenkeel.runtime.prepare import prepare


def main(arguments: Sequence[str] | None = None) -> None:
    options = _parse(arguments)
    config = load_config([options.work])
    prepared = prepare(config)

    def layout_of(ids: Sequence[WorkerId]) -> Layout:
        return arranged(first_layout(ids, prepared.spec.policy), options.shares, options.cuts)

    maker = prepared.maker
    if options.measures:
        maker = Probed(maker, str(Path(options.output).parent), tuple(options.measures))
    reports = run_static(
        maker,
        config.scaling.workers[1],
        layout_of,
        config.train.steps,
        copies=config.redundancy.copies,
        checkpoint_every=config.checkpoint.every_steps or None,
    )
    lines = [{"step": r.vote.step, "loss": r.vote.loss, "time": r.committed_at} for r in reports]
    Path(options.output).write_text("".join(json.dumps(line) + "\n" for line in lines))


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="static.py")
    parser.add_argument("work")
    parser.add_argument("output")
    parser.add_argument("measures", nargs="*")
    parser.add_argument("--shares", type=_numbers, help="micro-batches of each pipeline")
    parser.add_argument("--cuts", type=_numbers, help="the first layer of every stage but the first, in all pipelines")
    return parser.parse_intermixed_args(arguments)


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(map(int, text.split(",")))


def first_layout(ids: Sequence[WorkerId], policy: Policy) -> Layout:
    """The one that the controller would begin with."""
    workers = [WorkerInfo(worker_id, NodeId("local"), 0) for worker_id in ids]
    planned = plan_layout(workers, policy.wish, policy.model, policy.micro_batches, None)
    if isinstance(planned, Infeasible):
        raise ValueError(planned.reason)
    return planned.layout


def arranged(layout: Layout, shares: Sequence[int] | None, cuts: Sequence[int] | None) -> Layout:
    """The same workers with these shares, and with these cuts. Raises ValueError if they do not fit the layout."""
    depth = layout.pipelines[0].stages[-1].stop
    pipelines = layout.pipelines
    if shares is not None:
        bounds = pairwise(accumulate(shares, initial=0))
        pipelines = tuple(Pipeline(p.stages, *bound) for p, bound in zip(pipelines, bounds, strict=True))
    if cuts is not None:
        pipelines = tuple(_cut(p, (0, *cuts, depth)) for p in pipelines)
    made = Layout(pipelines)
    check_layout(made, depth, layout.micro_batches)
    return made


def _cut(pipeline: Pipeline, bounds: Sequence[int]) -> Pipeline:
    stages = zip(pipeline.stages, pairwise(bounds), strict=True)
    return replace(pipeline, stages=tuple(replace(stage, start=start, stop=stop) for stage, (start, stop) in stages))


if __name__ == "__main__":
    main()
