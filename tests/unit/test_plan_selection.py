import random

import pytest

from evenkeel.plan.batch import shares, slowest_finish
from evenkeel.plan.formations import Formation
from evenkeel.plan.selection import Search, bound_s, deal, finish_s, select
from evenkeel.plan.solver import Knapsack


def random_formation(rng: random.Random, units: tuple[int, ...]) -> Formation:
    """As fast as its units, more or less."""
    speed = sum(n * (k + 1) for k, n in enumerate(units))
    pace_s = rng.uniform(1, 1.5) / speed
    kinds = tuple(k for k, n in enumerate(units) for _ in range(n))
    after_s = rng.uniform(0, 0.2)
    return Formation(units, kinds, ((0, 1),), pace_s, pace_s * (len(kinds) - 1), after_s, after_s / 2)


def random_formations(rng: random.Random, depth: int) -> list[Formation]:
    chosen = [(i, j) for i in range(depth + 1) for j in range(depth + 1) if 0 < i + j <= depth and rng.random() < 0.7]
    return [random_formation(rng, units) for units in chosen]


def test_shares_by_classes_are_the_shares() -> None:
    rng = random.Random(0)
    for _ in range(200):
        pipelines = [(random_formation(rng, (1, i)), rng.randint(1, 5)) for i in range(rng.randint(1, 4))]
        total = sum(count for _, count in pipelines)
        minimum = rng.choice([0, 1])
        micro_batches = rng.randint(total if minimum else 1, 60)
        groups = deal(pipelines, micro_batches, minimum)
        assert sum(count * share for _, count, share in groups) == micro_batches
        assert all(share > 0 for _, _, share in groups)
        every = [f for f, count in pipelines for _ in range(count)]
        offsets = [f.finish_s(0) for f in every]
        times = [f.pace_s for f in every]
        best = slowest_finish(times, shares(times, micro_batches, minimum, offsets), offsets)
        assert max(f.finish_s(share) for f, _, share in groups) == pytest.approx(best)
        if minimum:
            assert sum(count for _, count, _ in groups) == total


def shortest_s(kinds: list[Formation], units: tuple[int, int], micro_batches: int, at_least: int) -> float:
    """The first of all finishes by which all micro-batches can be done."""
    knapsack = Knapsack([f.units for f in kinds], units, at_least)
    finishes = sorted(f.finish_s(k) for f in kinds for k in range(1, micro_batches + 1))
    several = next(
        (
            step_s
            for step_s in finishes
            if knapsack.most([min(micro_batches, f.share(step_s)) for f in kinds])[0] >= micro_batches
        ),
        float("inf"),
    )
    alone = min((finish_s([(f, 1, micro_batches)]) for f in kinds), default=float("inf"))
    return min(several, alone) if at_least == 1 else several


def test_the_shortest_step_of_all() -> None:
    rng = random.Random(1)
    for _ in range(100):
        kinds, micro_batches, at_least = random_formations(rng, 3), rng.randint(2, 20), rng.choice([1, 1, 2])
        kinds = [f for f in kinds if f.units[0] <= 3]
        search = Search((3, 4), micro_batches, ((1, 1), (1, 2)), at_least, float("inf"))
        best = shortest_s(kinds, (3, 4), micro_batches, at_least)
        found = select(kinds, search)
        assert (found.step_s if found else float("inf")) == pytest.approx(best)
        assert bound_s(kinds, search) <= best * (1 + 1e-9)
        if found:
            assert select(kinds, Search((3, 4), micro_batches, ((1, 1),), at_least, found.step_s)) is None


def test_many_units_by_linear_programs() -> None:
    """Too many for dynamic programming: the bound is one, and near."""
    rng = random.Random(2)
    for _ in range(8):
        kinds = random_formations(rng, 4)
        units, micro_batches = (100, 150), 2000
        found = select(kinds, Search(units, micro_batches, ((1, 2),), rng.choice([1, 60]), float("inf")))
        assert found is not None
        for k, n in enumerate(units):
            assert sum(f.units[k] * count for f, count, _ in found.groups) <= n
        assert sum(count * share for _, count, share in found.groups) == micro_batches
        assert found.step_s == pytest.approx(max(f.finish_s(share) for f, _, share in found.groups))
        assert found.bound_s <= found.step_s <= 1.02 * found.bound_s


def test_the_bound_of_linear_programs_is_below_the_best() -> None:
    """The same units once by dynamic programming and once by linear programs."""
    rng = random.Random(3)
    for _ in range(10):
        kinds, micro_batches = random_formations(rng, 3), rng.randint(20, 60)
        kinds = [f for f in kinds if f.units[0] <= 3]
        search = Search((20, 30), micro_batches, ((1, 2),), 1, float("inf"))
        exact = select(kinds, search)
        # A third kind of which no formation takes any makes too many states.
        wide = [Formation((*f.units, 0), f.kinds, f.cuts, f.pace_s, f.bubble_s, f.after_s, f.alone_s) for f in kinds]
        near = select(wide, Search((20, 30, 50), micro_batches, ((1, 2, 1),), 1, float("inf")))
        assert exact is not None and near is not None
        assert near.bound_s <= exact.step_s * (1 + 1e-9)
        assert exact.step_s <= near.step_s * (1 + 1e-9)
