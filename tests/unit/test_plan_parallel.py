import random
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator
from functools import cache
from statistics import mean

import pytest
from random_clusters import decoder, node_kinds, one_device_less, small_cluster, small_work
from test_plan_formations import every_way

from evenkeel.plan.formations import Costs, Formation
from evenkeel.plan.hardware import Cluster, DeviceKind, Link, NodeKind
from evenkeel.plan.layout import Infeasible
from evenkeel.plan.parallel import Limits, choose, scopes, uniform
from evenkeel.plan.pipelines import fill_and_pace_s
from evenkeel.plan.plans import Plan
from evenkeel.plan.selection import finish_s
from evenkeel.plan.workload import LayerWork, Workload

GIB = 2**30


def node(name: str, flops: float, devices: int = 1, memory: int = 80 * GIB, between: Link | None = None) -> NodeKind:
    device = DeviceKind(name, memory, {"bf16": flops}, 1e18, 1.0)
    return NodeKind(device, devices, Link(1e18), between or Link(1e18))


def blocks(layers: int, params: int = 1000, kept: int = 1000) -> Workload:
    """Equal layers of 1 s in all on a device of 1e12 FLOP/s, whose memory and links cost no time."""
    layer = LayerWork("block", 1e12 / 3, 2e12 / 3, params, params, kept, kept, 1, 0)
    return Workload((layer,) * layers, "bf16", 1, 1)


def plan(found: Plan | Infeasible) -> Plan:
    assert isinstance(found, Plan), found
    return found


@pytest.mark.parametrize(("fast", "slow", "ratio", "gain"), [(2, 2, 3.266, 2.133), (1, 3, 3.266, 1.566)])
def test_shares_by_speed_gain_what_the_closed_form_says(fast: int, slow: int, ratio: float, gain: float) -> None:
    """max(t) * mean(1 / t) of the device times over equal shares, at a depth of one."""
    cluster = Cluster(((node("fast", ratio * 1e12), fast), (node("slow", 1e12), slow)))
    work, limits = blocks(1), Limits(stages=1)
    shared = plan(choose(cluster, work, 4000, limits=limits))
    equal = plan(uniform(cluster, work, 4000, limits=limits))
    assert equal.step_s / shared.step_s == pytest.approx(gain, rel=0.01)


def free_cuts_s(cluster: Cluster, work: Workload, micro_batches: int) -> float:
    """The shortest step of all: every way to make pipelines, every order, every cut, all parts, all shares."""
    return min(
        (
            step_s
            for scope in scopes(cluster, work, micro_batches, Limits(), None)
            for step_s in _shortest(Costs(scope, work, None), micro_batches)
        ),
        default=float("inf"),
    )


def _shortest(costs: Costs, micro_batches: int) -> Iterator[float]:
    units, every = costs.scope.units, list(every_way(costs, 0.0))
    parts = 1
    while parts == 1 or parts <= min(micro_batches, sum(units)):
        fitting = [f for f in every if costs.short_bytes(f, 1 / parts) <= 0]
        if parts == 1:
            yield from (finish_s([(f, 1, micro_batches)]) for f in fitting)
        finishes = sorted({f.finish_s(k) for f in fitting for k in range(1, micro_batches + 1)})
        first = bisect_left(finishes, True, key=lambda t, fs=fitting, n=parts: _most(fs, units, n, t) >= micro_batches)
        yield from finishes[first : first + 1]
        parts *= 2


def _most(fitting: list[Formation], units: tuple[int, ...], at_least: int, step_s: float) -> int:
    """The most micro-batches in a step, by recursion over what is left."""
    shares: dict[tuple[int, ...], int] = {}
    for f in fitting:
        shares[f.units] = max(shares.get(f.units, 0), f.share(step_s))

    @cache
    def most(left: tuple[int, ...], pipelines: int) -> int:
        best = 0 if pipelines <= 0 else -(10**9)
        for taken, share in shares.items():
            rest = tuple(n - x for n, x in zip(left, taken, strict=True))
            if share and min(rest) >= 0:
                best = max(best, share + most(rest, max(0, pipelines - 1)))
        return best

    return most(units, at_least)


def test_against_exhaustive_search() -> None:
    """200 random clusters of up to 8 devices and models of up to 6 layers, no two alike.

    The planner cuts each pipeline for its pace, the search in every way. They come to the same step but for a few of a
    hundred, where the pipelines have few micro-batches and a shorter way through them is worth a slower pace.
    """
    excess = []
    for seed in range(200):
        rng = random.Random(seed)
        cluster, work, micro_batches = small_cluster(rng, 8), small_work(rng, 6), rng.randint(1, 24)
        best_s, found = free_cuts_s(cluster, work, micro_batches), choose(cluster, work, micro_batches)
        if isinstance(found, Infeasible):
            assert best_s == float("inf"), seed
            continue
        excess.append(found.step_s / best_s - 1)
        assert found.gap == 0
        check_plan(found, cluster, work, micro_batches)
    assert len(excess) >= 150
    assert min(excess) >= -1e-9
    assert sum(e < 1e-9 for e in excess) >= 0.97 * len(excess)
    assert mean(excess) < 0.002


def check_plan(found: Plan, cluster: Cluster, work: Workload, micro_batches: int) -> None:
    """Every layer and micro-batch once, no device twice, nobody's memory exceeded, times as the parts add up to."""
    assert found.micro_batches == micro_batches
    groups: Counter[NodeKind] = Counter()
    for pipeline in found.pipelines:
        assert pipeline.share > 0 and pipeline.count > 0
        assert [s.layers[0] for s in pipeline.stages] == [0, *(s.layers[1] for s in pipeline.stages[:-1])]
        assert pipeline.stages[-1].layers[1] == len(work.layers)
        for stage in pipeline.stages:
            groups[stage.node] += pipeline.count
            assert stage.layers[0] < stage.layers[1]
            assert stage.memory.total <= 0.9 * stage.node.device.memory + 1
        assert pipeline.compute_s == pytest.approx(fill_and_pace_s([s.time for s in pipeline.stages], pipeline.share))
    assert found.step_s == pytest.approx(max(p.finish_s for p in found.pipelines))
    assert 1 <= found.copies <= found.data
    idle = Counter({i.node: i.devices for i in found.idle})
    for kind in {kind for kind, _ in cluster.nodes}:
        nodes = sum(count for k, count in cluster.nodes if k == kind)
        assert groups[kind] <= kind.devices // found.tensor * nodes
        assert found.tensor * groups[kind] + idle[kind] == kind.devices * nodes
    assert work.tensor_divides % found.tensor == 0


@pytest.mark.parametrize("block", range(10))
def test_never_worse_than_simpler_plans_nor_than_with_less(block: int) -> None:
    """500 random clusters: uniform, one stage each by shares alone, and the same with one device removed."""
    for seed in range(50 * block, 50 * block + 50):
        rng = random.Random(seed)
        kinds = node_kinds(rng, rng.randint(1, 3), (1, 2, 4))
        cluster = Cluster(tuple((kind, rng.randint(1, 3)) for kind in kinds))
        work, micro_batches = decoder(rng.randint(1, 10), rng.choice([1024, 2048, 4096]), 4096), rng.randint(1, 100)
        step_s = seconds(choose(cluster, work, micro_batches))
        less = one_device_less(cluster, rng.randrange(len(kinds)))
        others = [
            seconds(uniform(cluster, work, micro_batches)),
            seconds(choose(cluster, work, micro_batches, limits=Limits(stages=1, tensor=1))),
            seconds(choose(less, work, micro_batches)) if less.devices else float("inf"),
        ]
        assert step_s <= min(others) * (1 + 1e-9), seed


def seconds(found: Plan | Infeasible) -> float:
    return found.step_s if isinstance(found, Plan) else float("inf")
