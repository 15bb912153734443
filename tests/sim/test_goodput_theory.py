"""Closed forms of the goodput simulator, against counting, drawing, and the placement that runs really use."""

from collections.abc import Callable
from heapq import heappop, heappush
from itertools import combinations
from math import comb, inf
from random import Random

import pytest
from scipy.stats import poisson

from evenkeel.core.ids import NodeId, WorkerId
from evenkeel.core.layout import Layout, Pipeline, Stage
from evenkeel.core.model import LayerShape, ModelShape, ParamShape
from evenkeel.plan.copies import place_copies
from evenkeel.plan.interval import optimal_seconds
from evenkeel.sim.goodput.theory import efficiency, spares_needed, survival

KNOWN = [
    (11135, 20, 300, 654, 0.9162),
    (6490, 60, 300, 843, 0.8308),
    (72115, 120, 600, 4081, 0.9356),
    (600, 5, 60, 74.2, 0.7930),
    (811, 60, 300, 273, 0.4580),
]
"""Seconds between failures, of a checkpoint, of a restart and of work between checkpoints; and what comes of it."""


@pytest.mark.parametrize(("mean", "cost", "restart", "work", "expected"), KNOWN)
def test_efficiency(mean: float, cost: float, restart: float, work: float, expected: float) -> None:
    """Drawn failures give the same: test_plan_interval.py, of what this is one over; test_goodput_run.py, of these."""
    assert efficiency(work, cost, mean, restart) == pytest.approx(expected, abs=5e-5)
    assert optimal_seconds(cost, mean) == pytest.approx(work, rel=0.002)  # so these are the best ones


def test_efficiency_where_nothing_gets_done() -> None:
    assert efficiency(1e6, 1.0, 1.0) == 0.0


@pytest.mark.parametrize("times", [(0, 1, 1, 1), (1, -1, 1, 1), (1, 1, 0, 1), (1, 1, 1, -1), (1, 1, float("nan"), 1)])
def test_times_that_cannot_be(times: tuple[float, float, float, float]) -> None:
    with pytest.raises(ValueError, match="must be positive"):
        efficiency(*times)


@pytest.mark.parametrize(("lost", "expected"), [(2, 0.9333), (3, 0.8), (4, 0.6154)])
def test_survival(lost: int, expected: float) -> None:
    assert survival(16, lost, 2) == pytest.approx(expected, abs=5e-5)


@pytest.mark.parametrize(("nodes", "copies"), [(8, 1), (8, 2), (12, 2), (12, 3), (12, 4), (9, 3), (6, 6)])
def test_survival_against_the_placement_of_a_run(nodes: int, copies: int) -> None:
    """All choices of lost workers, one by one, in a run of so many data-parallel workers with so many copies."""
    kept_by = owners_in_a_run(nodes, copies)
    for lost in range(nodes + 1):
        alive = sum(all(set(owners) - set(gone) for owners in kept_by) for gone in combinations(range(nodes), lost))
        assert survival(nodes, lost, copies) == pytest.approx(alive / comb(nodes, lost), abs=1e-12)


def owners_in_a_run(nodes: int, copies: int) -> set[tuple[int, ...]]:
    workers = [WorkerId(f"w{i:02d}") for i in range(nodes)]
    model = ModelShape((LayerShape("layer", (ParamShape("weight", (64 * nodes,), None),)),))
    layout = Layout(tuple(Pipeline((Stage(0, 1, (w,)),), i, i + 1) for i, w in enumerate(workers)))
    placed = place_copies(layout, model, copies, {w: NodeId(w) for w in workers}, alignment=4)
    return {tuple(workers.index(w) for w in part.owners) for group in placed.groups for part in group.parts}


def test_survival_of_many() -> None:
    """Exact also where the terms have hundreds of digits and nearly cancel."""
    assert survival(2048, 2, 2) == pytest.approx(1 - 1 / 2047, rel=1e-12)
    assert survival(2048, 1025, 2) == 0.0
    assert 0.0 < survival(2048, 200, 2) < survival(2048, 200, 4) < 1.0


@pytest.mark.parametrize(("nodes", "lost", "copies"), [(16, 2, 3), (16, 17, 2), (16, -1, 2), (16, 2, 0), (0, 0, 1)])
def test_groups_that_cannot_be(nodes: int, lost: int, copies: int) -> None:
    with pytest.raises(ValueError, match="these must be whole"):
        survival(nodes, lost, copies)


def test_spares() -> None:
    assert spares_needed(2048, 6.5e-3, 1.0, 0.99) == 22
    assert spares_needed(2048, 0.0, 1.0, 0.99) == 0
    assert spares_needed(16, 1e9, 1.0, 0.99) == pytest.approx(16e9, rel=1e-4)  # at once
    with pytest.raises(ValueError, match="fewer than 1e15"):
        spares_needed(16, 1e300, 1.0, 0.99)
    for nodes, confidence in ((1, 0.5), (64, 0.95), (16384, 0.999), (200_000, 0.99)):
        assert spares_needed(nodes, 6.5e-3, 1.0, confidence) == poisson.ppf(confidence, nodes * 6.5e-3)


@pytest.mark.parametrize("spread", ["exponential", "fixed", "two kinds"])
def test_spares_against_drawn_repairs(spread: str) -> None:
    """The share of time in which no more than so many are in repair, whatever the distribution of repair times."""
    random = Random(3)
    repairs: dict[str, Callable[[], float]] = {
        "exponential": lambda: random.expovariate(1 / 0.5),
        "fixed": lambda: 0.5,
        "two kinds": lambda: 0.1 if random.random() < 0.75 else 1.7,
    }
    nodes, rate, share = 64, 0.05, 0.95
    spares = spares_needed(nodes, rate, 0.5, share)
    enough = [time_within(n, random, nodes * rate, repairs[spread]) for n in (spares - 1, spares)]
    assert enough[0] < share < enough[1]


def time_within(spares: int, random: Random, failures_per_day: float, repair: Callable[[], float]) -> float:
    """The share of 40,000 days, after some to fill up, in which at most so many nodes are in repair."""
    begin, end, clock, within = 50.0, 40_050.0, 0.0, 0.0
    back: list[float] = []
    failure = random.expovariate(failures_per_day)
    while clock < end:
        coming = min(failure, back[0] if back else inf, end)
        if len(back) <= spares:
            within += max(0.0, coming - max(clock, begin))
        clock = coming
        if back and back[0] == coming:
            heappop(back)
        elif failure == coming:
            heappush(back, clock + repair())
            failure = clock + random.expovariate(failures_per_day)
    return within / (end - begin)


@pytest.mark.parametrize(
    "given", [(0, 0.1, 1, 0.9), (8, -0.1, 1, 0.9), (8, 0.1, -1, 0.9), (8, 0.1, 1, 1.0), (8, 0.1, 1, 0.0)]
)
def test_spares_of_what_cannot_be(given: tuple[int, float, float, float]) -> None:
    with pytest.raises(ValueError, match="confidence between 0 and 1"):
        spares_needed(*given)
