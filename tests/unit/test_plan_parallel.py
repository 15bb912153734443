import random
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator
from functools import cache

import pytest
from random_clusters import decoder, node_kinds, one_device_less, small_cluster, small_work
from test_plan_formations import every_way

from evenkeel.plan.hardware import Cluster, DeviceKind, Link, NodeKind
from evenkeel.plan.layout import Infeasible
from evenkeel.plan.parallel import Limits, choose, scopes, uniform
from evenkeel.plan.pipelines import fill_and_pace_s
from evenkeel.plan.plans import Plan
from evenkeel.plan.scopes import Costs, Formation
from evenkeel.plan.workload import LayerTime, LayerWork, Profile, Workload

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
    """Of each number of pipelines and each slowest sum, the first finish by which all micro-batches can be done."""
    units, parts = costs.scope.units, 1
    while parts <= min(micro_batches, sum(units)):
        every = list(every_way(costs, 1 / parts))
        for pipelines in range(parts, min(micro_batches, sum(units)) + 1):
            for sum_s in sorted({f.sum_s(pipelines) for f in every}):
                some = [f for f in every if f.sum_s(pipelines) <= sum_s]
                finishes = sorted({f.finish_s(k) for f in some for k in range(1, min(f.most, micro_batches) + 1)})
                first = bisect_left(
                    finishes, True, key=lambda t, fs=some, n=pipelines: _most(fs, units, n, t) >= micro_batches
                )
                yield from (finish_s + sum_s for finish_s in finishes[first : first + 1])
        parts += 1


def _most(fitting: list[Formation], units: tuple[int, ...], pipelines: int, time_s: float) -> int:
    """The most micro-batches that so many pipelines do, by recursion over what is left."""
    shares: dict[tuple[int, ...], int] = {}
    for f in fitting:
        shares[f.units] = max(shares.get(f.units, 0), f.share(time_s))

    @cache
    def most(left: tuple[int, ...], pipelines: int) -> int:
        best = 0 if pipelines == 0 else -(10**9)
        for taken, share in shares.items():
            rest = tuple(n - x for n, x in zip(left, taken, strict=True))
            if share and pipelines and min(rest) >= 0:
                best = max(best, share + most(rest, pipelines - 1))
        return best

    return most(units, pipelines)


@pytest.mark.parametrize("block", range(8))
def test_against_exhaustive_search(block: int) -> None:
    """200 random clusters of up to 8 devices and models of up to 6 layers, no two alike: never a longer step."""
    planned = 0
    for seed in range(25 * block, 25 * block + 25):
        rng = random.Random(seed)
        cluster, work, micro_batches = small_cluster(rng, 8), small_work(rng, 6), rng.randint(1, 24)
        best_s, found = free_cuts_s(cluster, work, micro_batches), choose(cluster, work, micro_batches)
        assert seconds(found) == pytest.approx(best_s, rel=1e-9), seed
        if isinstance(found, Plan):
            planned += 1
            assert found.gap == pytest.approx(0, abs=1e-9)
            check_plan(found, cluster, work, micro_batches)
    assert planned >= 15


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
    assert found.step_s == pytest.approx(max(p.finish_s for p in found.pipelines) + found.sum_s)
    assert 0.5 * found.step_s < found.expected_s <= found.step_s * (1 + 1e-9)
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
    possible = better = 0
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
        possible += step_s < float("inf")
        better += step_s < min(others[:2]) * (1 - 1e-6)
    assert possible >= 45
    assert better >= 8, "no simple plan is as good"


def seconds(found: Plan | Infeasible) -> float:
    return found.step_s if isinstance(found, Plan) else float("inf")


def planned_for_halves(nodes: int, seed: int) -> tuple[Plan, Cluster, Workload]:
    """So many nodes of 8 of each of two kinds of device, and a micro-batch for each device."""
    rng = random.Random(seed)
    cluster = Cluster(tuple((kind, nodes) for kind in node_kinds(rng, 2, (8,))))
    work = decoder(rng.choice([12, 32]), 4096, 4096, recompute=rng.random() < 0.5)
    found = plan(choose(cluster, work, 16 * nodes))
    check_plan(found, cluster, work, 16 * nodes)
    return found, cluster, work


@pytest.mark.parametrize("nodes", [16, 256])
def test_large_clusters(nodes: int) -> None:
    """Two kinds of device in nodes of 8: near the bound, and a small value however many devices there are."""
    for seed in range(3):
        found, cluster, work = planned_for_halves(nodes, seed)
        assert 0 <= found.gap <= 0.01
        assert len(found.pipelines) <= 12
        assert found.step_s <= plan(uniform(cluster, work, 16 * nodes)).step_s


def drawn(devices: int, seed: int) -> tuple[Cluster, Workload, int]:
    """Two kinds of device in nodes of 8, in any ratio; any model; 0.5 to 8 micro-batches for each device."""
    rng, nodes = random.Random(seed), devices // 8
    one, other = node_kinds(rng, 2, (8,))
    first = rng.choice([nodes // 2, nodes // 2, nodes // 4, max(1, nodes // 8), nodes - max(1, nodes // 8)])
    first = min(max(1, first), nodes - 1)
    layers, width = rng.choice([12, 24, 32, 48, 80]), rng.choice([2048, 4096, 8192])
    work = decoder(layers, width, 4096, recompute=rng.random() < 0.5)
    micro_batches = max(1, int(devices * rng.choice([0.5, 1, 2, 2, 4, 8])))
    return Cluster(((one, first), (other, nodes - first))), work, micro_batches


@pytest.mark.parametrize(
    ("devices", "seed"),
    [(256, 10), (256, 173), (4096, 35), (4096, 62), (4096, 7), (16384, 7), (16384, 25), *((4096, n) for n in range(5))],
)
def test_however_large_the_plan_is_near_the_best(devices: int, seed: int) -> None:
    cluster, work, micro_batches = drawn(devices, seed)
    found = choose(cluster, work, micro_batches)
    if isinstance(found, Plan):
        check_plan(found, cluster, work, micro_batches)
        assert 0 <= found.gap <= 0.01


def test_a_kind_more_does_not_make_it_worse() -> None:
    """Of four kinds of device mixed pipelines are less deep than of three; so each three are looked at, too."""
    rng = random.Random(5016)
    kinds = node_kinds(rng, rng.randint(2, 4), (1,))
    numbers = [rng.choice([1, 2, 3, 5, 8, 13, 20]) for _ in kinds]
    cluster = Cluster(tuple(zip(kinds, numbers, strict=True)))
    work = decoder(rng.choice([8, 16, 24, 32]), rng.choice([4096, 8192]), 4096, recompute=rng.random() < 0.3)
    micro_batches, least = rng.randint(4, 60), min(range(len(kinds)), key=lambda k: numbers[k])
    assert numbers == [3, 1, 8, 13]
    less = plan(choose(one_device_less(cluster, least), work, micro_batches))
    assert plan(choose(cluster, work, micro_batches)).step_s <= less.step_s * (1 + 1e-9)


def test_any_number_of_pipelines_may_share_the_optimizer_state() -> None:
    """Each has memory for 11 bytes per parameter: 6 of parameters and gradients, a third of 12 of the optimizer."""
    params = 10 * GIB // 18
    cluster = Cluster(((node("card", 1e12, memory=params * 11 * 10 // 9), 3),))
    found = plan(choose(cluster, blocks(1, params=params, kept=0), 12))
    assert (found.data, found.copies) == (3, 1)


@pytest.mark.parametrize("nodes", [2, 4, 12])
def test_below_256_devices_the_best_is_found(nodes: int) -> None:
    """Of the pipelines that are looked at no selection is better, by the bound."""
    for seed in range(3):
        found, *_ = planned_for_halves(nodes, seed)
        assert found.gap == 0


def test_what_was_measured_decides() -> None:
    """A device that is slow by its figures and measured to be as fast as the other gets as much."""
    cluster = Cluster(((node("fast", 4e12), 1), (node("slow", 1e12), 1)))
    work = blocks(1)
    shares = sorted(p.share for p in plan(choose(cluster, work, 50)).pipelines)
    assert shares == [10, 40]
    measured = Profile({("slow", 1): (LayerTime(1 / 12, 2 / 12),)})
    shares = [(p.count, p.share) for p in plan(choose(cluster, work, 50, profile=measured)).pipelines]
    assert shares in ([(2, 25)], [(1, 25), (1, 25)])


def test_links_that_were_measured_say_who_waits_for_whom() -> None:
    """By the tables the first kind has the faster link, measured it is the other; and inside it is slower, too."""
    a, b = (node(name, 1e12, 2, between=Link(speed)) for name, speed in (("a", 1e9), ("b", 1e8)))
    links = {("a", "a", "between"): Link(1e7), ("b", "b", "between"): Link(2e9), ("a", "a", "inside"): Link(3e7)}
    cluster, limits = Cluster(((a, 2), (b, 2))), Limits(tensor=1)
    counted = next(scopes(cluster, blocks(2), 8, limits, None))
    measured = next(scopes(cluster, blocks(2), 8, limits, Profile(links=links)))
    assert (counted.kinds, counted.link) == ((a,), Link(1e9))
    assert (measured.kinds, measured.link) == ((b,), Link(2e9))
    both = list(scopes(cluster, blocks(2), 8, limits, Profile(links=links)))[1]
    assert (both.kinds, both.inside, both.link) == ((b, a), (Link(1e18), Link(3e7)), Link(1e7))


def test_few_micro_batches_keep_few_activations() -> None:
    """Stages of 4 GiB of state, with room for activations of two micro-batches: a pipeline of four fits with two."""
    work = blocks(4, params=4 * GIB // 18, kept=GIB)
    cluster = Cluster(((node("card", 1e12, memory=int(6.01 * GIB)), 4),))
    found = plan(choose(cluster, work, 2, limits=Limits(memory=1.0)))
    assert [len(p.stages) for p in found.pipelines] == [4]
    assert isinstance(choose(cluster, work, 3, limits=Limits(memory=1.0)), Infeasible)


def test_the_optimizer_state_is_cut_where_it_does_not_fit_whole() -> None:
    """6 bytes a parameter and 12 of optimizer state or a part of it: four pipelines keep two copies of each half."""
    work = blocks(1, params=10 * GIB // 18, kept=0)
    whole = plan(choose(Cluster(((node("card", 1e12, memory=12 * GIB), 4),)), work, 8))
    assert (whole.data, whole.copies) == (4, 4)
    half = plan(choose(Cluster(((node("card", 1e12, memory=8 * GIB), 4),)), work, 8, limits=Limits(copies=2)))
    assert (half.data, half.copies) == (4, 2)
    none = choose(Cluster(((node("card", 1e12, memory=8 * GIB), 4),)), work, 8, limits=Limits(copies=3))
    assert isinstance(none, Infeasible)
    assert none.short_bytes > 0


def test_a_plan_says_why() -> None:
    cluster = Cluster(((node("fast", 4e12), 2), (node("slow", 1e10), 1)))
    found = plan(choose(cluster, blocks(2), 8, limits=Limits(stages=1)))
    text = "\n".join(found.reason)
    assert "4 micro-batches of 0.5 s in the slowest stage (stage 0 of 1, layers 0 to 1 on fast)" in text
    assert "2 pipelines, TP 1, the optimizer state in 2 copies; no plan that was looked at is better" in text
    assert "2 devices fast: 2 layers each, in 2 pipelines of its own; busy 100% of the step" in text
    assert "1 device slow idle: a micro-batch takes it 200 s, longer than a step" in text
