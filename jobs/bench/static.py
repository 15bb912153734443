"""The engine alone: the work in a fixed layout, without controller, heartbeat and Ray.

Arguments: work.yaml, output, and what bench/probe.py is to measure inside the workers.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from bench.probe import Probed
from evenkeel.config import load_config
from evenkeel.core.ids import NodeId, WorkerId
from evenkeel.core.layout import Layout, WorkerInfo
from evenkeel.engine.local import run_static
from evenkeel.plan.layout import Infeasible, plan_layout
from evenkeel.runtime.prepare import prepare


def main() -> None:
    work, output, *measures = sys.argv[1:]
    config = load_config([work])
    prepared = prepare(config)
    policy = prepared.spec.policy

    def layout_of(ids: Sequence[WorkerId]) -> Layout:
        """The one that the controller would begin with."""
        workers = [WorkerInfo(worker_id, NodeId("local"), 0) for worker_id in ids]
        planned = plan_layout(workers, policy.wish, policy.model, policy.micro_batches, None)
        if isinstance(planned, Infeasible):
            raise ValueError(planned.reason)
        return planned.layout

    maker = Probed(prepared.maker, str(Path(output).parent), tuple(measures)) if measures else prepared.maker
    reports = run_static(
        maker,
        config.scaling.workers[1],
        layout_of,
        config.train.steps,
        copies=config.redundancy.copies,
        checkpoint_every=config.checkpoint.every_steps or None,
    )
    lines = [{"step": r.vote.step, "loss": r.vote.loss, "time": r.committed_at} for r in reports]
    Path(output).write_text("".join(json.dumps(line) + "\n" for line in lines))


if __name__ == "__main__":
    main()
