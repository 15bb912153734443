import random
from functools import cache
from itertools import combinations_with_replacement

import pytest

from evenkeel.plan.solver import NEVER, Column, Knapsack, whole


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
        most, numbers = Knapsack(columns, units, at_least, 100).most(gains, 10**6)
        assert most == dumb(columns, gains, units, at_least)
        if most != NEVER:
            assert sum(n * g for n, g in zip(numbers, gains, strict=True)) == most
            assert sum(numbers) >= at_least or at_least == 1
            for k, n in enumerate(units):
                assert sum(x * column[k] for x, column in zip(numbers, columns, strict=True)) <= n


def test_the_knapsack_with_few_pieces_against_trying_all() -> None:
    rng = random.Random(2)
    for _ in range(300):
        columns, gains, units, at_least = random_program(rng)
        at_most = rng.randint(at_least, 5)
        exact = dumb_few(columns, gains, units, at_least, at_most)
        knapsack = Knapsack(columns, units, at_least, at_most)
        most, numbers = knapsack.most(gains, max(1, exact))
        assert (most == exact) if exact > 0 else most <= 0
        assert knapsack.most(gains, max(1, exact) + 1)[0] < max(1, exact) + 1
        if exact > 0:
            assert max(1, at_least) <= sum(numbers) <= at_most
            assert sum(n * g for n, g in zip(numbers, gains, strict=True)) == most


def dumb_few(columns: list[Column], gains: list[int], units: Column, at_least: int, at_most: int) -> int:
    """Of at_least to at_most columns that gain."""
    best = NEVER if at_least > 1 else 0
    useful = [c for c, gain in enumerate(gains) if gain]
    for pieces in range(at_least, at_most + 1):
        for chosen in combinations_with_replacement(useful, pieces):
            if all(sum(columns[c][k] for c in chosen) <= n for k, n in enumerate(units)):
                best = max(best, sum(gains[c] for c in chosen))
    return best


def test_integer_programs_find_what_is_enough_or_say_that_nothing_is(capfd: pytest.CaptureFixture[str]) -> None:
    rng = random.Random(1)
    for _ in range(100):
        columns, gains, units, at_least = random_program(rng)
        at_most = rng.randint(at_least, 5)
        exact = dumb_few(columns, gains, units, at_least, at_most)
        enough = max(1, exact) + rng.randint(-3, 1)
        numbers, never = whole(columns, gains, (units, at_least, at_most), max(1, enough), 1000)
        assert never == (exact < max(1, enough))
        assert any(numbers) != never
        if any(numbers):
            assert at_least <= sum(numbers) <= at_most
            assert sum(n * g for n, g in zip(numbers, gains, strict=True)) >= enough
            for k, n in enumerate(units):
                assert sum(x * column[k] for x, column in zip(numbers, columns, strict=True)) <= n
    assert capfd.readouterr().out == ""
