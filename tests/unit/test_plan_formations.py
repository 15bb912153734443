import random
from collections.abc import Iterator
from itertools import combinations, pairwise, product
from math import inf

import pytest
from random_clusters import small_cluster, small_work

from evenkeel.plan.cost import stage_memory
from evenkeel.plan.formations import can_be_formed, counts, formations
from evenkeel.plan.parallel import Limits, scopes
from evenkeel.plan.scopes import Costs, Formation, Scope
from evenkeel.plan.workload import Workload

Cut = tuple[int, int]


def every_way(costs: Costs, owned: float) -> Iterator[Formation]:
    """All orders of all units and all cuts of the layers, if they fit into the memory."""
    units, layers = costs.scope.units, costs.layers
    for depth in range(1, min(sum(units), layers) + 1):
        for kinds in product(range(len(units)), repeat=depth):
            if any(kinds.count(k) > n for k, n in enumerate(units)):
                continue
            for middles in combinations(range(1, layers), depth - 1):
                cuts = tuple(pairwise((0, *middles, layers)))
                if most := costs.most(kinds, cuts, owned):
                    yield costs.formation(kinds, cuts, most)


def some_costs(seed: int) -> tuple[Costs, Workload, float]:
    rng = random.Random(seed)
    cluster, work = small_cluster(rng, 6), small_work(rng, 6)
    scope: Scope = rng.choice(list(scopes(cluster, work, 8, Limits(), None)))
    return Costs(scope, work, None), work, rng.choice([0.0, 0.25, 1.0])


def takes_no_more(some: Formation, other: Formation) -> bool:
    return all(a <= b for a, b in zip(some.units, other.units, strict=True))


@pytest.mark.parametrize("block", range(4))
def test_no_order_and_no_cut_has_a_faster_pace(block: int) -> None:
    """120 random scopes: each formation is the fastest of its units, and what is left out is no faster with more."""
    for seed in range(30 * block, 30 * block + 30):
        costs, _, owned = some_costs(seed)
        found = formations(costs, owned, 64)
        assert all(formation.most for formation in found)
        for other in every_way(costs, owned):
            best = min((f.pace_s for f in found if f.most == 8 and takes_no_more(f, other)), default=inf)
            assert other.most < 8 or best <= other.pace_s * (1 + 1e-9), seed


def test_memory_is_that_of_the_cost_model() -> None:
    for seed in range(40):
        costs, work, owned = some_costs(seed)
        for formation in formations(costs, owned, 64):
            depth = len(formation.cuts)
            for s, cut in enumerate(formation.cuts):
                real = stage_memory(work, cut, costs.scope.tensor, depth - s, owned).total
                assert costs.bytes(*cut, depth - s, owned) == pytest.approx(real, abs=1)


def test_the_fewest_stages() -> None:
    for seed in range(40):
        costs, _, owned = some_costs(seed)
        assert can_be_formed(costs, owned, 64) == min(
            (len(f.kinds) for f in every_way(costs, owned) if f.most == 8), default=0
        )


def test_what_a_step_costs() -> None:
    """Of each formation: the passes of its stages add up to what it says."""
    for seed in range(40):
        costs, _, owned = some_costs(seed)
        for formation in formations(costs, owned, 64):
            times = [costs.passes(k, *cut).total_s for k, cut in zip(formation.kinds, formation.cuts, strict=True)]
            assert formation.pace_s == pytest.approx(max(times))
            assert formation.pace_s + formation.bubble_s == pytest.approx(sum(times))
            most = min(3, formation.most)
            step_s = formation.finish_s(most)
            assert (formation.share(step_s), formation.share(step_s * (1 - 1e-9))) == (most, most - 1)
            assert formation.share(2 * step_s) <= formation.most
            assert formation.sum_s(1) == 0 < formation.sum_s(2) <= formation.sum_s(3)


def test_counts() -> None:
    assert counts((2, 1), 2) == [(0, 0), (0, 1), (1, 0), (1, 1), (2, 0)]
    assert len(counts((8, 8), 64)) == 81
    many = counts((1000, 1000, 1000), 50)
    assert len(many) < 400
    assert (50, 0, 0) in many and (0, 0, 50) in many and (2, 3, 2) in many
