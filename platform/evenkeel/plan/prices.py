"""What no selection of pipelines beats, by prices.

All micro-batches of a step are divided into what the units of each kind and what the pipelines, as many as there may
be, are worth together. If within a time no formation does more micro-batches than its units and one pipeline are worth,
then all together do not do more than all: no step is shorter (weak duality of linear programs). The best prices give
what the linear program over parts of pipelines gives (G. Dantzig, P. Wolfe, "Decomposition principle for linear
programs", 1960). They are searched by the ellipsoid method (D. Yudin, A. Nemirovski, 1976; N. Shor, 1977), since the
formation that is done first says where better prices lie: only those are that make it dearer.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, floor, inf, sqrt
from operator import mul

CLOSE = 3e-4
"""How near the best the bound is, as part of it."""

Prices = tuple[float, ...]
"""The parts of all micro-batches that the units of each kind, and at last the pipelines, are worth: 1 together."""


@dataclass(frozen=True, slots=True)
class Bound:
    """That no selection takes less than `step_s`, by these prices."""

    step_s: float
    prices: Prices


@dataclass(frozen=True, slots=True)
class Offer:
    """A formation: what it takes and what it gives.

    Attributes:
        fixed_s: of a step, whatever its share.
        pace_s: per micro-batch.
        most: micro-batches for which there is memory.
        parts: what it takes of the units of each kind and of the pipelines there may be, in micro-batches, as if each
            of these were worth all.
    """

    fixed_s: float
    pace_s: float
    most: int
    parts: tuple[float, ...]

    def share(self, within_s: float) -> int:
        """How many micro-batches it does within that time, 0 if not one."""
        return max(0, min(self.most, floor((within_s - self.fixed_s) / self.pace_s * (1 + 1e-12))))


def bound(offers: Sequence[Offer], wanted_s: float = inf, start: Prices = ()) -> Bound:
    """How long a step of these is at least.

    Args:
        offers: at least one.
        wanted_s: more is of no interest.
        start: prices that may be good, or none.
    """
    size = len(offers[0].parts) - 1
    best = Bound(_first(offers, start)[0] if start else 0.0, start)
    search = _Ellipsoid(size)
    while best.step_s < wanted_s and search.left:
        prices = (*search.center, 1 - sum(search.center))
        worst = min(range(size + 1), key=prices.__getitem__)
        if prices[worst] < 0:
            # No price is negative.
            search.keep([float(i == worst) for i in range(size)] if worst < size else [-1.0] * size)
            continue
        time_s, first = _first(offers, prices)
        best = Bound(time_s, prices) if time_s > best.step_s else best
        if first is None:
            break
        rise = search.keep([part - first.parts[-1] for part in first.parts[:-1]])
        if rise * first.pace_s <= CLOSE * best.step_s:
            break
    return best


def useful(offers: Sequence[Offer], gains: Sequence[int], micro_batches: int, prices: Prices) -> list[int]:
    """Which of them a selection may have that does all micro-batches, if in a step each does so many as it gains.

    Not those of which one alone would cost more, beside what it gains, than all are worth beside what must be done
    (G. Dantzig, D. Fulkerson, S. Johnson, "Solution of a large-scale traveling-salesman problem", 1954).
    """
    costs = [sum(map(mul, offer.parts, prices)) for offer in offers]
    dearer = max((gain / cost for gain, cost in zip(gains, costs, strict=True) if cost > 0), default=0.0) * (1 + 1e-9)
    room = (dearer - 1) * micro_batches
    return [i for i, (gain, cost) in enumerate(zip(gains, costs, strict=True)) if dearer * cost - gain <= room]


def _first(offers: Sequence[Offer], prices: Prices) -> tuple[float, Offer | None]:
    """Which is done first with as many micro-batches as it costs, and when."""
    least, first = inf, None
    for offer in offers:
        share = ceil(sum(map(mul, offer.parts, prices)))
        if share <= offer.most and offer.fixed_s + share * offer.pace_s < least:
            least, first = offer.fixed_s + share * offer.pace_s, offer
    return least, first


class _Ellipsoid:
    """Where the best point lies: all x with (x - center) · shape⁻¹ (x - center) <= 1.

    Attributes:
        left: so many more cuts.
    """

    def __init__(self, size: int) -> None:
        """Around all prices of so many kinds."""
        self.center = [1 / (size + 1)] * size
        self._shape = [[float(i == j) for j in range(size)] for i in range(size)]
        self.left = 20 * size * (size + 1)

    def keep(self, direction: Sequence[float]) -> float:
        """Only what is not less than the centre in this direction; returns by how much the most was more than it."""
        size, self.left = len(self.center), self.left - 1
        along = [sum(map(mul, row, direction)) for row in self._shape]
        square = sum(map(mul, along, direction))
        if square <= 0:
            self.left = 0
            return 0.0
        most = sqrt(square)
        unit = [x / most for x in along]
        self.center = [x + y / (size + 1) for x, y in zip(self.center, unit, strict=True)]
        grown = size**2 / (size**2 - 1) if size > 1 else 1.0
        shrunk = 2 / (size + 1) if size > 1 else 0.75
        self._shape = [
            [grown * (x - shrunk * unit[i] * unit[j]) for j, x in enumerate(row)] for i, row in enumerate(self._shape)
        ]
        return most
