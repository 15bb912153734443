import random
from dataclasses import replace

import pytest

from evenkeel.plan.batch import shares, slowest_finish
from evenkeel.plan.hardware import Link
from evenkeel.plan.scopes import Formation, GradientSum
from evenkeel.plan.selection import EXACT, NEAR, Search, bound_s, deal, select, step_s


def random_formation(rng: random.Random, units: tuple[int, ...]) -> Formation:
    """As fast as its units, more or less."""
    speed = sum(n * (k + 1) for k, n in enumerate(units))
    pace_s = rng.uniform(1, 1.5) / speed
    kinds = tuple(k for k, n in enumerate(units) for _ in range(n))
    size, near = rng.uniform(0, 0.5), rng.randint(1, 4)
    sums = (GradientSum(size, near, Link(5.0, 0.001), Link(1.0, 0.01)),)
    most = rng.choice([1, 2, 5, 10**6, 10**6, 10**6])
    return Formation(units, kinds, ((0, 1),), pace_s, pace_s * (len(kinds) - 1), rng.uniform(0, 0.1), sums, most)


def random_formations(rng: random.Random, depth: int) -> list[Formation]:
    chosen = [(i, j) for i in range(depth + 1) for j in range(depth + 1) if 0 < i + j <= depth and rng.random() < 0.7]
    return [random_formation(rng, units) for units in chosen]


def test_shares_by_classes_are_the_shares() -> None:
    rng = random.Random(0)
    for _ in range(200):
        pipelines = [(random_formation(rng, (1, i)), rng.randint(1, 5)) for i in range(rng.randint(1, 4))]
        pipelines = [(replace(f, most=10**6), count) for f, count in pipelines]
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


def test_a_sum_is_a_barrier() -> None:
    """The slowest pipeline and the slowest sum are of two pipelines, and both count; over as many as there are."""
    link = Link(1.0)
    slow = Formation((1,), (0,), ((0, 1),), 3.0, 0.0, 0.0, (GradientSum(0.5, 1, link, link),), 9)
    large = Formation((2,), (0, 0), ((0, 1), (1, 2)), 1.0, 0.5, 0.25, (GradientSum(2.0, 1, link, link),), 9)
    assert step_s([(slow, 1, 2), (large, 1, 2)]) == pytest.approx(6 + 2 * 2.0 / 2)
    assert step_s([(slow, 1, 2), (large, 2, 2)]) == pytest.approx(6 + 2 * 2 * 2.0 / 3)
    assert step_s([(large, 1, 2)]) == pytest.approx(2.75)


def shortest_s(kinds: list[Formation], units: tuple[int, ...], micro_batches: int, at_least: int) -> float:
    """By trying every multiset of formations, and for each the first finish by which all micro-batches are done."""
    best = float("inf")

    def add(chosen: list[Formation], left: tuple[int, ...], first: int) -> None:
        nonlocal best
        if len(chosen) >= max(1, at_least) and sum(f.most for f in chosen) >= micro_batches:
            best = min(best, _done_s(chosen, micro_batches))
        for i in range(first, len(kinds)):
            rest = tuple(n - x for n, x in zip(left, kinds[i].units, strict=True))
            if min(rest) >= 0 and len(chosen) < micro_batches:
                add([*chosen, kinds[i]], rest, i)

    add([], units, 0)
    return best


def _done_s(chosen: list[Formation], micro_batches: int) -> float:
    """Each has a micro-batch at least."""
    finishes = sorted({f.finish_s(k) for f in chosen for k in range(1, min(f.most, micro_batches) + 1)})
    sum_s = max(f.sum_s(len(chosen)) for f in chosen)
    for time_s in finishes:
        done = [f.share(time_s) for f in chosen]
        if min(done) and sum(done) >= micro_batches:
            return time_s + sum_s
    return float("inf")


@pytest.mark.parametrize("block", range(4))
def test_the_shortest_step_of_all(block: int) -> None:
    """Against trying all numbers of all formations; within every number of pipelines sums take another time."""
    for seed in range(40 * block, 40 * block + 40):
        rng = random.Random(seed)
        micro_batches, at_least = rng.randint(2, 20), rng.choice([1, 1, 2])
        kinds = [f for f in random_formations(rng, 3) if f.units[0] <= 3]
        search = Search((3, 3), micro_batches, at_least, float("inf"), EXACT)
        best = shortest_s(kinds, (3, 3), micro_batches, at_least)
        found, bound = select(kinds, search)
        assert (found.step_s if found else float("inf")) == pytest.approx(best), seed
        assert bound <= best * (1 + 1e-9)
        assert bound_s(kinds, search) <= best * (1 + 1e-9)
        if found:
            assert bound == found.step_s == pytest.approx(step_s(found.groups))
            assert select(kinds, replace(search, beat_s=found.step_s))[0] is None


def test_many_units_by_linear_programs() -> None:
    """Too many for dynamic programming: the bound is one, and near."""
    rng = random.Random(2)
    for _ in range(8):
        kinds = [replace(f, most=10**6) for f in random_formations(rng, 4)]
        units, micro_batches = (100, 150), 2000
        found, bound = select(kinds, Search(units, micro_batches, rng.choice([1, 60]), float("inf"), NEAR))
        assert found is not None
        for k, n in enumerate(units):
            assert sum(f.units[k] * count for f, count, _ in found.groups) <= n
        assert sum(count * share for _, count, share in found.groups) == micro_batches
        assert found.step_s == pytest.approx(step_s(found.groups))
        assert bound <= found.step_s <= 1.01 * bound


@pytest.mark.parametrize("block", range(3))
def test_integer_programs_find_what_dynamic_programming_finds(block: int) -> None:
    """The same units once by tables and once by integer programs, exactly and nearly."""
    for seed in range(6 * block, 6 * block + 6):
        rng = random.Random(seed)
        kinds, micro_batches = random_formations(rng, 3), rng.randint(20, 60)
        search = Search((6, 10), micro_batches, rng.choice([1, 1, 3]), float("inf"), EXACT)
        exact, bound = select(kinds, search)
        if exact is None:
            continue
        assert bound == exact.step_s
        # Units of a third kind of which no formation takes any make it too many for tables.
        wide = [replace(f, units=(*f.units, 0)) for f in kinds]
        same, bound = select(wide, replace(search, units=(6, 10, 50)))
        assert same is not None
        assert same.step_s == pytest.approx(exact.step_s, rel=1e-7)
        assert bound == same.step_s
        near, bound = select(wide, replace(search, units=(6, 10, 50), worth=NEAR))
        assert near is not None
        assert bound <= exact.step_s * (1 + 1e-9) <= near.step_s * (1 + 2e-9) <= exact.step_s * (1 + 2 * NEAR)


@pytest.mark.parametrize("block", range(4))
def test_what_is_said_of_the_best_is_true(block: int) -> None:
    """Against trying all: few units of up to three kinds, with tables and programs, exactly and nearly."""
    tried = 0
    for seed in [*range(60 * block, 60 * block + 60), 352, 381, 503, 645, 1206]:
        rng = random.Random(seed)
        units = tuple(rng.randint(0, 3) for _ in range(rng.choice([1, 2, 3])))
        drawn = [tuple(rng.randint(0, n) for n in units) for _ in range(rng.randint(1, 7))]
        kinds = [random_formation(rng, some) for some in drawn if any(some)]
        if not kinds:
            continue
        micro_batches, at_least, worth = rng.randint(1, 9), rng.choice([1, 1, 2, 3]), rng.choice([EXACT, NEAR])
        best = shortest_s(kinds, units, micro_batches, at_least)
        if rng.random() < 0.5:
            kinds, units = [replace(f, units=(*f.units, 0)) for f in kinds], (*units, 50)
        beat_s = rng.choice([float("inf"), float("inf"), best * 1.0001])
        search = Search(units, micro_batches, at_least, beat_s, worth)
        found, bound = select(kinds, search)
        tried += 1
        assert min(bound_s(kinds, search), beat_s) <= best * (1 + 1e-8), seed
        assert bound <= best * (1 + 1e-8) or (found is None and best >= beat_s), seed
        if best < beat_s * (1 - worth):
            assert found is not None, seed
            assert best * (1 - 1e-9) <= found.step_s <= best * (1 + (1e-7 if worth == EXACT else 2 * NEAR)), seed
    assert tried >= 40
