"""The bound by prices against linear programs, and what it leaves out against trying all."""

import random
from itertools import product

import pytest
from scipy.optimize import linprog

from evenkeel.plan.prices import CLOSE, Offer, bound, useful

MICRO_BATCHES = 40


def random_offers(rng: random.Random, kinds: int, units: tuple[int, ...], most: int) -> list[tuple[Offer, list[int]]]:
    """With how many units of each kind each takes."""
    found = []
    for _ in range(rng.randint(2, 12)):
        taken = [rng.randint(0, 3) for _ in range(kinds)]
        taken[rng.randrange(kinds)] += 1
        parts = [MICRO_BATCHES * (1 - 1e-9) * n / u for n, u in zip((*taken, 1), (*units, most), strict=True)]
        pace_s = rng.uniform(1, 2) / sum(n * (k + 1) for k, n in enumerate(taken))
        found.append((Offer(rng.uniform(0, 3), pace_s, rng.choice([3, 9, 99]), tuple(parts)), taken))
    return found


def relaxed_s(offers: list[tuple[Offer, list[int]]], units: tuple[int, ...], most: int) -> float:
    """The shortest time within which parts of pipelines do all, by bisection; infinite if none is."""

    def done(time_s: float) -> bool:
        gains = [-float(offer.share(time_s)) for offer, _ in offers]
        rows = [[float(taken[k]) for _, taken in offers] for k in range(len(units))] + [[1.0] * len(offers)]
        found = linprog(gains, A_ub=rows, b_ub=[*units, most])
        return bool(-found.fun >= MICRO_BATCHES * (1 - 1e-6))

    low, high = 0.0, 10_000.0
    if not done(high):
        return float("inf")
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (low, middle) if done(middle) else (middle, high)
    return high


@pytest.mark.parametrize("kinds", [1, 2, 3, 4])
def test_prices_bound_what_linear_programs_find(kinds: int) -> None:
    rng = random.Random(kinds)
    near = 0
    for _ in range(25):
        units, most = tuple(rng.randint(4, 20) for _ in range(kinds)), rng.randint(2, 30)
        offers = random_offers(rng, kinds, units, most)
        exact_s = relaxed_s(offers, units, most)
        found = bound([offer for offer, _ in offers])
        assert found.step_s <= exact_s * (1 + 1e-6)
        assert found.prices is not None and sum(found.prices) == pytest.approx(1)
        near += found.step_s >= exact_s * (1 - 3 * CLOSE) or exact_s == float("inf")
        again = bound([offer for offer, _ in offers], start=found.prices)
        assert again.step_s >= found.step_s
        wanted = bound([offer for offer, _ in offers], found.step_s / 2, found.prices)
        assert wanted.step_s == found.step_s, "prices that are good enough are taken as they are"
    assert near >= 23


def test_what_is_left_out_is_in_no_selection_that_does_all() -> None:
    rng = random.Random(7)
    left_out = 0
    for _ in range(60):
        units, most = (rng.randint(2, 5), rng.randint(2, 5)), rng.randint(2, 5)
        offers = random_offers(rng, 2, units, most)[:5]
        found = bound([offer for offer, _ in offers])
        if found.step_s == float("inf") or found.prices is None:
            continue
        gains = [offer.share(found.step_s * rng.uniform(1, 1.4)) for offer, _ in offers]
        kept = useful([offer for offer, _ in offers], gains, MICRO_BATCHES, found.prices)
        left_out += len(offers) - len(kept)
        for numbers in product(range(6), repeat=len(offers)):
            taken = [sum(n * t[k] for n, (_, t) in zip(numbers, offers, strict=True)) for k in range(2)]
            fits = sum(numbers) <= most and all(n <= u for n, u in zip(taken, units, strict=True))
            if fits and sum(n * g for n, g in zip(numbers, gains, strict=True)) >= MICRO_BATCHES:
                assert all(i in kept for i, n in enumerate(numbers) if n)
    assert left_out >= 20
