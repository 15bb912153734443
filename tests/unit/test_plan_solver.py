import random
from functools import cache

import pytest

from evenkeel.plan.solver import NEVER, Column, Knapsack, relaxed, whole


def random_program(rng: random.Random) -> tuple[list[Column], list[int], Column, int]:
    kinds = rng.randint(1, 3)
    units = tuple(rng.randint(0, 5) for _ in range(kinds))
    columns = [tuple(rng.randint(0, 3) for _ in range(kinds)) for _ in range(rng.randint(1, 6))]
    columns = [column for column in columns if any(column)] or [(1,) * kinds]
    return columns, [rng.randint(0, 9) for _ in columns], units, rng.randint(1, 4)


def dumb(columns: list[Column], gains: list[int], units: Column, at_least: int) -> int:
    @cache
    def most(left: Column, pieces: int) -> int:
        best = 0 if pieces <= 0 else -1000
        for column, gain in zip(columns, gains, strict=True):
            rest = tuple(n - x for n, x in zip(left, column, strict=True))
            if gain and min(rest) >= 0:
                best = max(best, gain + most(rest, pieces - 1))
        return best

    return max(most(units, at_least if at_least > 1 else 0), NEVER)


def test_the_knapsack_against_trying_all() -> None:
    rng = random.Random(0)
    for _ in range(300):
        columns, gains, units, at_least = random_program(rng)
        most, numbers = Knapsack(columns, units, at_least).most(gains)
        assert most == dumb(columns, gains, units, at_least)
        if most != NEVER:
            assert sum(n * g for n, g in zip(numbers, gains, strict=True)) == most
            assert sum(numbers) >= at_least or at_least == 1
            for k, n in enumerate(units):
                assert sum(x * column[k] for x, column in zip(numbers, columns, strict=True)) <= n


def test_parts_of_pieces_gain_at_least_as_much(capfd: pytest.CaptureFixture[str]) -> None:
    rng = random.Random(1)
    for _ in range(60):
        columns, gains, units, at_least = random_program(rng)
        exact = dumb(columns, gains, units, at_least)
        bound, prices = relaxed(columns, gains, units, at_least)
        most, numbers = whole(columns, gains, units, at_least)
        assert bound >= exact - 1e-6
        assert most == exact
        if at_least == 1 and bound > 0:
            assert sum(n * y for n, y in zip(units, prices, strict=True)) == pytest.approx(bound)
        for k, n in enumerate(units):
            assert sum(x * column[k] for x, column in zip(numbers, columns, strict=False)) <= n
    assert capfd.readouterr().out == ""
