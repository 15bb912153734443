"""How long planning takes: pure Python, in this process."""

import time

from bench.process import BenchError
from evenkeel.core.ids import NodeId, WorkerId
from evenkeel.core.layout import WorkerInfo, check_layout
from evenkeel.core.model import LayerShape, ModelShape, ParamShape
from evenkeel.plan.layout import Infeasible, Wish, plan_layout

LAYERS, WIDTH, HIDDEN, VOCABULARY = 80, 8192, 28672, 128256
"""A model of about 70 billion parameters."""
BLOCK = (
    ("query", (WIDTH, WIDTH), 0),
    ("output", (WIDTH, WIDTH), 1),
    ("up", (HIDDEN, WIDTH), 0),
    ("down", (WIDTH, HIDDEN), 1),
)
MICRO_BATCHES = 2048
WISHES = (Wish(64, 8, 8, 8, 4096), Wish(None, None, None, 8, 4096), Wish(128, 16, 8, 8, 16384))
"""Fixed degrees; everybody, as it comes out; and a run that has a quarter of its full strength, where depth and number
of pipelines are weighed against each other."""


def large_model() -> ModelShape:
    blocks = [
        LayerShape(f"blocks.{i}", tuple(ParamShape(f"blocks.{i}.{name}", shape, cut) for name, shape, cut in BLOCK))
        for i in range(LAYERS)
    ]
    embed = LayerShape("embed", (ParamShape("embed.tokens", (VOCABULARY, WIDTH), 0),), cost=0.02)
    head = LayerShape("head", (ParamShape("head.output", (VOCABULARY, WIDTH), 0),), cost=0.9)
    return ModelShape((embed, *blocks, head), tensor_divides=8)


def equal_4096() -> float:
    """Seconds for a layout of 4,096 equal workers in 512 nodes: the slowest of WISHES.

    Raises:
        BenchError: if a layout leaves a worker out.
    """
    model = large_model()
    workers = [WorkerInfo(WorkerId(f"w{i:04d}"), NodeId(f"n{i // 8:03d}"), i, "cuda", "GPU") for i in range(4096)]
    return max(_timed(workers, wish, model) for wish in WISHES)


def _timed(workers: list[WorkerInfo], wish: Wish, model: ModelShape) -> float:
    began = time.perf_counter()
    planned = plan_layout(workers, wish, model, MICRO_BATCHES, None)
    taken = time.perf_counter() - began
    if isinstance(planned, Infeasible):
        raise BenchError(planned.reason)
    check_layout(planned.layout, model.depth, MICRO_BATCHES)
    if len(planned.layout.members) != len(workers):
        raise BenchError(f"only {len(planned.layout.members)} of {len(workers)} workers have a place")
    return taken
