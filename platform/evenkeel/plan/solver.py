"""How many of which column: integer programs with few rows, by dynamic programming where they are small.

The only module that uses scipy (HiGHS: Q. Huangfu, J. Hall, "Parallelizing the dual revised simplex method", 2018).
"""

from collections.abc import Sequence
from functools import cached_property
from itertools import product

Column = tuple[int, ...]
"""How many units of each kind one piece takes."""

NEVER = -1
"""Less than any gain."""


class Knapsack:
    """Exact: the most that pieces can gain together, by dynamic programming over all numbers of units left.

    Args:
        columns: what may be taken any number of times.
        units: of each kind, at most.
        at_least: how many pieces there must be.
    """

    def __init__(self, columns: Sequence[Column], units: Column, at_least: int) -> None:
        self._columns, self._units = columns, units
        self._levels = at_least if at_least > 1 else 0

    @cached_property
    def _ways(self) -> list[list[tuple[int, int]]]:
        """Of each number of units left: the columns that fit, and what is then left."""
        states = list(product(*(range(n + 1) for n in self._units)))
        index = {state: i for i, state in enumerate(states)}
        return [
            [
                (c, index[tuple(n - x for n, x in zip(state, column, strict=True))])
                for c, column in enumerate(self._columns)
                if all(n >= x for n, x in zip(state, column, strict=True))
            ]
            for state in states
        ]

    def most(self, gains: Sequence[int]) -> tuple[int, list[int]]:
        """The largest total gain, and how many of each column; NEVER if there cannot be so many pieces."""
        best: list[list[int]] = []
        taken: list[list[tuple[int, int] | None]] = []
        for level in range(self._levels + 1):
            best.append([0 if level == 0 else NEVER] * len(self._ways))
            taken.append([None] * len(self._ways))
            for state, ways in enumerate(self._ways):
                here, below = best[level], best[max(0, level - 1)]
                for c, rest in ways:
                    if gains[c] > 0 and below[rest] != NEVER and gains[c] + below[rest] > here[state]:
                        here[state], taken[level][state] = gains[c] + below[rest], (c, rest)
        numbers = [0] * len(self._columns)
        level, state = self._levels, len(self._ways) - 1
        while (piece := taken[level][state]) is not None:
            numbers[piece[0]] += 1
            level, state = max(0, level - 1), piece[1]
        return best[-1][-1], numbers


def relaxed(columns: Sequence[Column], gains: Sequence[int], units: Column, at_least: int) -> float:
    """The most that pieces can gain if there may be parts of pieces: no whole numbers gain more."""
    from scipy.optimize import linprog  # not for those who only plan small clusters: it takes a second to import

    kept, rows, limits = _program(columns, gains, units, at_least)
    if not kept:
        return NEVER
    done = linprog([-gains[c] for c in kept], A_ub=rows, b_ub=limits, method="highs")
    return -float(done.fun) if done.status == 0 and done.fun is not None else NEVER


def whole(columns: Sequence[Column], gains: Sequence[int], units: Column, at_least: int) -> tuple[int, list[int]]:
    """The most that whole pieces gain, to 0.1 %, and how many of each column."""
    from scipy.optimize import Bounds, LinearConstraint, milp

    kept, rows, limits = _program(columns, gains, units, at_least)
    if not kept:
        return NEVER, []
    done = milp(
        [-gains[c] for c in kept],
        integrality=[1] * len(kept),
        bounds=Bounds(0, float("inf")),
        constraints=LinearConstraint(rows, ub=limits),
        options={"mip_rel_gap": 1e-3, "node_limit": 2000},
    )
    if done.x is None:
        return NEVER, []
    numbers = [0] * len(columns)
    for c, x in zip(kept, done.x, strict=True):
        numbers[c] = round(float(x))
    return sum(n * g for n, g in zip(numbers, gains, strict=True)), numbers


def _program(
    columns: Sequence[Column], gains: Sequence[int], units: Column, at_least: int
) -> tuple[list[int], list[list[float]], list[float]]:
    """The columns that gain something, the rows over them, and what each row may be at most."""
    kept = [c for c, gain in enumerate(gains) if gain > 0]
    rows = [[float(columns[c][k]) for c in kept] for k in range(len(units))]
    limits = [float(n) for n in units]
    if at_least > 1:
        rows.append([-1.0] * len(kept))
        limits.append(-float(at_least))
    return kept, rows, limits
