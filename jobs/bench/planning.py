"""How long planning takes: pure Python, in this process."""

import random
import time
from collections.abc import Mapping
from dataclasses import dataclass

from bench.process import BenchError
from evenkeel.core.ids import NodeId, WorkerId
from evenkeel.core.layout import WorkerInfo, check_layout
from evenkeel.core.model import LayerShape, ModelShape, ParamShape
from evenkeel.plan.hardware import Cluster
from evenkeel.plan.layout import Infeasible, Wish, plan_layout
from evenkeel.plan.parallel import choose
from evenkeel.plan.plans import Plan
from evenkeel.plan.speeds import Speeds, recut_by
from evenkeel.plan.workload import Workload
from evenkeel.tools.clusters import read_cluster
from evenkeel.tools.devices import published

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


def _workers() -> list[WorkerInfo]:
    """4,096 in 512 nodes."""
    return [WorkerInfo(WorkerId(f"w{i:04d}"), NodeId(f"n{i // 8:03d}"), i, "cuda", "GPU") for i in range(4096)]


def equal_4096() -> float:
    """Seconds for a layout of 4,096 equal workers in 512 nodes: the slowest of WISHES.

    Raises:
        BenchError: if a layout leaves a worker out.
    """
    model = large_model()
    return max(_timed(_workers(), wish, model) for wish in WISHES)


def replan_4096() -> float:
    """Seconds for cuts and shares of 64 pipelines of 8 TP groups of 8 by what each of 4,096 workers was measured to do.

    Raises:
        BenchError: if that does not make the step shorter.
    """
    model, rng = large_model(), random.Random(0)
    planned = plan_layout(_workers(), WISHES[0], model, MICRO_BATCHES, None)
    if isinstance(planned, Infeasible):
        raise BenchError(planned.reason)
    paces = {worker: rng.choice((1.0, 1.3, 2.0)) * rng.uniform(0.99, 1.01) for worker in planned.layout.members}
    speeds = Speeds(tuple(layer.cost for layer in model.layers), paces)
    began = time.perf_counter()
    layout = recut_by(planned.layout, speeds)
    taken = time.perf_counter() - began
    if speeds.finish_s(layout) >= speeds.finish_s(planned.layout):
        raise BenchError("other cuts and shares did not make the step shorter")
    return taken


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


# ---------------------------------------------------------------- two kinds of device

MOST_GAP = 0.01
"""By what part a step may be longer than what no plan beats, on large clusters."""
EXACT = 255
"""Up to so many devices the plan must be the best."""


@dataclass(frozen=True, slots=True)
class Decoder:
    """By its parameters' number, and the keys of its section `model`."""

    name: str
    keys: Mapping[str, int]


SHARED = {"vocab_size": 128256, "kv_heads": 8, "seq_len": 4096}
MEDIUM = Decoder("8 B", {**SHARED, "d_model": 4096, "layers": 32, "heads": 32, "d_ff": 14336})
LARGE = Decoder("70 B", {**SHARED, "d_model": 8192, "layers": 80, "heads": 64, "d_ff": 28672})


@dataclass(frozen=True, slots=True)
class Mixed:
    """Half of the devices are H100, half A100 with 40 GB, in nodes of 8.

    Attributes:
        must_s, goal_s: the search over all TP degrees.
    """

    devices: int
    micro_batches: int
    model: Decoder
    must_s: float
    goal_s: float

    @property
    def name(self) -> str:
        return f"mixed_{self.devices}"

    def cluster(self) -> Cluster:
        return read_cluster(f"{self.devices // 2}xH100+{self.devices // 2}xA100-40", published())


MIXED = (
    Mixed(16, 128, MEDIUM, 0.2, 0.1),
    Mixed(256, 512, LARGE, 2.0, 1.0),
    Mixed(4096, 2048, LARGE, 5.0, 2.5),
    Mixed(16384, 4096, LARGE, 15.0, 7.5),
)


def counted(model: Decoder) -> Workload:
    """The work of a decoder on one sequence, bf16."""
    import torch

    from evenkeel.engine.counting import count_work
    from evenkeel.models.registry import load_model

    tokens = torch.zeros(1, SHARED["seq_len"], dtype=torch.int64)
    return count_work(load_model("decoder", model.keys), tokens, tokens, "bf16")


def mixed(case: Mixed, work: Workload) -> tuple[float, Plan]:
    """Seconds for a plan, and the plan.

    Raises:
        BenchError: if there is none, or it may be too far from the best.
    """
    cluster = case.cluster()
    began = time.perf_counter()
    found = choose(cluster, work, case.micro_batches)
    taken = time.perf_counter() - began
    if isinstance(found, Infeasible):
        raise BenchError(found.reason)
    most = 1e-9 if case.devices <= EXACT else MOST_GAP
    if found.gap > most:
        raise BenchError(f"a step may be {found.gap:.2%} longer than the best, at most {most:.2%} is allowed")
    return taken, found
