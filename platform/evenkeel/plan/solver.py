"""How many of which column: integer programs with few rows, by dynamic programming where they are small.

The only module that uses scipy (HiGHS: Q. Huangfu, J. Hall, "Parallelizing the dual revised simplex method", 2018).
"""

from collections.abc import Sequence
from itertools import product
from math import prod
from operator import ge, le

Column = tuple[int, ...]
"""How many units of each kind one piece takes."""

NEVER = -1
"""Less than any gain."""


class Knapsack:
    """Exact: the most that pieces can gain together, by dynamic programming over all numbers of units.

    Args:
        columns: what may be taken any number of times.
        units: of each kind, at most.
        at_least: how many pieces there must be.
    """

    def __init__(self, columns: Sequence[Column], units: Column, at_least: int) -> None:
        self._columns = columns
        self._levels = at_least if at_least > 1 else 0
        self._states = list(product(*(range(n + 1) for n in units)))
        strides = [prod(n + 1 for n in units[k + 1 :]) for k in range(len(units))]
        self._steps = [sum(n * stride for n, stride in zip(column, strides, strict=True)) for column in columns]
        self._fits: dict[int, list[int]] = {}

    def most(self, gains: Sequence[int]) -> tuple[int, list[int]]:
        """The largest total gain, and how many of each column; NEVER if there cannot be so many pieces."""
        useful = self._useful(gains)
        best = [[0] * len(self._states)]
        taken: list[list[int | None]] = [[None] * len(self._states)]
        for c in useful:
            self._add(c, gains[c], best[0], best[0], taken[0])
        for _ in range(self._levels):
            best.append([NEVER] * len(self._states))
            taken.append([None] * len(self._states))
            for c in useful:
                self._add(c, gains[c], best[-2], best[-1], taken[-1])
        numbers = [0] * len(self._columns)
        level, state = self._levels, len(self._states) - 1
        while (piece := taken[level][state]) is not None:
            numbers[piece] += 1
            level, state = max(0, level - 1), state - self._steps[piece]
        return best[-1][-1], numbers

    def _add(self, c: int, gain: int, below: list[int], best: list[int], taken: list[int | None]) -> None:
        step = self._steps[c]
        for state in self._fitting(c):
            total = below[state - step] + gain
            if total > best[state] and below[state - step] != NEVER:
                best[state], taken[state] = total, c

    def _fitting(self, c: int) -> list[int]:
        """Numbers of units, as indices, that column c fits into."""
        if c not in self._fits:
            column = self._columns[c]
            self._fits[c] = [i for i, state in enumerate(self._states) if all(map(ge, state, column))]
        return self._fits[c]

    def _useful(self, gains: Sequence[int]) -> list[int]:
        """Columns that gain more than any other that takes no more."""
        useful: list[int] = []
        for c in sorted(
            (c for c, gain in enumerate(gains) if gain > 0), key=lambda c: (sum(self._columns[c]), -gains[c])
        ):
            mine = self._columns[c]
            if not any(gains[o] >= gains[c] and all(map(le, self._columns[o], mine)) for o in useful):
                useful.append(c)
        return useful


def relaxed(
    columns: Sequence[Column], gains: Sequence[int], units: Column, at_least: int
) -> tuple[float, tuple[float, ...]]:
    """The most that pieces can gain if there may be parts of pieces, and what one more unit of each kind is worth.

    No whole numbers gain more.
    """
    from scipy.optimize import linprog  # not for those who only plan small clusters: it takes a second to import

    kept, rows, limits = _program(columns, gains, units, at_least)
    if not kept:
        return (NEVER if at_least > 1 else 0.0), ()
    done = linprog([-gains[c] for c in kept], A_ub=rows, b_ub=limits, method="highs")
    if done.status != 0 or done.fun is None:
        return NEVER, ()
    return -float(done.fun), tuple(-float(y) for y in done.ineqlin.marginals[: len(units)])


def whole(columns: Sequence[Column], gains: Sequence[int], units: Column, at_least: int) -> tuple[int, list[int]]:
    """The most that whole pieces gain, to 0.1 %, and how many of each column."""
    from scipy.optimize import Bounds, LinearConstraint, milp

    kept, rows, limits = _program(columns, gains, units, at_least)
    if not kept:
        return (NEVER if at_least > 1 else 0), [0] * len(columns)
    done = milp(
        [-gains[c] for c in kept],
        integrality=[1] * len(kept),
        bounds=Bounds(0, float("inf")),
        constraints=LinearConstraint(rows, ub=limits),
        options={"mip_rel_gap": 1e-3, "node_limit": 100},
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
