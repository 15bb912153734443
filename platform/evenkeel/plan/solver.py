"""How many of which column: integer programs with few rows, by dynamic programming where they are small.

The only module that uses scipy (HiGHS: Q. Huangfu, J. Hall, "Parallelizing the dual revised simplex method", 2018).
"""

from collections.abc import Sequence
from itertools import product
from math import inf, prod
from operator import ge, le

Column = tuple[int, ...]
"""How many units of each kind one piece takes."""

INFEASIBLE = 2
"""So scipy says it."""

GAP = 2e-3
"""By what part of its gain a solution may be worse than another."""

NEVER = -1
"""Less than any gain."""


class Knapsack:
    """Exact: the most that pieces can gain together, by dynamic programming over all numbers of units.

    Args:
        columns: what may be taken any number of times.
        units: of each kind, at most.
        at_least: how many pieces there must be.
        at_most: and may be.
    """

    def __init__(self, columns: Sequence[Column], units: Column, at_least: int, at_most: int) -> None:
        self._columns = columns
        self._at_least = at_least if at_least > 1 else 0
        self._at_most = at_most
        self._states = list(product(*(range(n + 1) for n in units)))
        strides = [prod(n + 1 for n in units[k + 1 :]) for k in range(len(units))]
        self._steps = [sum(n * stride for n, stride in zip(column, strides, strict=True)) for column in columns]
        self._fits: dict[int, list[int]] = {}

    def most(self, gains: Sequence[int], enough: int) -> tuple[int, list[int]]:
        """The largest total gain, or one that is enough, and how many of each column.

        The gain is NEVER if there cannot be so many pieces, and may be too large where it is less than enough.
        """
        useful = self._useful(gains)
        gained, numbers = self._any_number(useful, gains)
        if gained < enough or sum(numbers) <= self._at_most:
            return gained, numbers
        return self._limited(useful, gains, enough)

    def _any_number(self, useful: Sequence[int], gains: Sequence[int]) -> tuple[int, list[int]]:
        """Of at_least pieces and more."""
        best = [[0] * len(self._states)]
        taken: list[list[int | None]] = [[None] * len(self._states)]
        for c in useful:
            self._add(c, gains[c], best[0], best[0], taken[0])
        for _ in range(self._at_least):
            self._add_level(useful, gains, best, taken)
        return best[-1][-1], self._numbers(taken)

    def _limited(self, useful: Sequence[int], gains: Sequence[int], enough: int) -> tuple[int, list[int]]:
        """Of at_least to at_most pieces: one more with each level."""
        best = [[0] * len(self._states)]
        taken: list[list[int | None]] = [[None] * len(self._states)]
        most: tuple[int, list[int]] = NEVER, [0] * len(self._columns)
        for pieces in range(1, self._at_most + 1):
            self._add_level(useful, gains, best, taken)
            if pieces >= self._at_least and best[-1][-1] > most[0]:
                most = best[-1][-1], self._numbers(taken)
                if most[0] >= enough:
                    break
        return most

    def _add_level(
        self,
        useful: Sequence[int],
        gains: Sequence[int],
        best: list[list[int]],
        taken: list[list[int | None]],
    ) -> None:
        best.append([NEVER] * len(self._states))
        taken.append([None] * len(self._states))
        for c in useful:
            self._add(c, gains[c], best[-2], best[-1], taken[-1])

    def _numbers(self, taken: Sequence[Sequence[int | None]]) -> list[int]:
        """How many of each column, back from the last level and all units."""
        numbers = [0] * len(self._columns)
        level, state = len(taken) - 1, len(self._states) - 1
        while (piece := taken[level][state]) is not None:
            numbers[piece] += 1
            level, state = max(0, level - 1), state - self._steps[piece]
        return numbers

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


def whole(
    columns: Sequence[Column], gains: Sequence[int], limits: tuple[Column, int, int], enough: int, nodes: int
) -> tuple[list[int], bool]:
    """How many of each column, so that all together gain enough, or none of any; and whether nothing gains that.

    Args:
        limits: the units of each kind, and how many pieces there must and may be.
        nodes: of the search tree, at most; then it may be that neither is known.
    """
    from scipy.optimize import Bounds, LinearConstraint, milp  # not for small clusters: it takes a second to import

    numbers, (units, at_least, at_most) = [0] * len(columns), limits
    kept = [c for c, gain in enumerate(gains) if gain > 0]
    if not kept:
        return numbers, True
    rows = [[float(columns[c][k]) for c in kept] for k in range(len(units))]
    rows += [[1.0] * len(kept), [float(gains[c]) for c in kept]]
    least = [0.0] * len(units) + [float(at_least), float(enough)]
    most = [*map(float, units), float(at_most), inf]
    done = milp(
        [-gains[c] for c in kept],
        integrality=[1] * len(kept),
        bounds=Bounds(0, inf),
        constraints=LinearConstraint(rows, least, most),
        options={"mip_rel_gap": GAP, "node_limit": nodes, "presolve": False},
    )
    if done.x is not None:
        for c, x in zip(kept, done.x, strict=True):
            numbers[c] = round(float(x))
    return numbers, done.status == INFEASIBLE
