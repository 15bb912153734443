"""Where a model is cut into pipeline stages: so that the slowest stage is as fast as it can be."""

from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate, pairwise

Cuts = tuple[tuple[int, int], ...]
"""Layers (start, stop) of each stage."""


def most_stages(costs: Sequence[float]) -> int:
    """The deepest pipeline in which every stage can have work: one stage per layer that costs anything."""
    return max(1, sum(cost > 0 for cost in costs))


@lru_cache(maxsize=1024)
def stage_cuts(costs: tuple[float, ...], stages: int) -> Cuts:
    """Contiguous stages of at least one layer each, exact by dynamic programming.

    The slowest stage is as fast as it can be; among such cuts the sum of the squares of the stages' costs is the
    smallest, so that the others are even too, and no stage idles while another has two layers with work.

    Raises:
        ValueError: if there are fewer layers than stages, none asked for, or a cost is negative.
    """
    depth = len(costs)
    if not 1 <= stages <= depth:
        raise ValueError(f"{depth} layers do not make {stages} stages")
    if min(costs) < 0:
        raise ValueError(f"a layer costs less than nothing: {costs}")
    prefix = (0.0, *accumulate(costs))
    limit = _slowest(prefix, stages) * (1 + 1e-12)
    # best[j]: (sum of squares, where the last stage starts) for the layers before j in as many stages as rows so far
    rows: list[list[tuple[float, int]]] = [[(0.0, 0)] + [(float("inf"), 0)] * depth]
    for s in range(1, stages + 1):
        row = [(float("inf"), 0)] * (depth + 1)
        for j in range(s, depth - (stages - s) + 1):
            for i in range(j - 1, s - 2, -1):
                cost = prefix[j] - prefix[i]
                if cost > limit:
                    break
                row[j] = min(row[j], (rows[-1][i][0] + cost * cost, i))
        rows.append(row)
    bounds = [depth]
    for row in reversed(rows[1:]):
        bounds.append(row[bounds[-1]][1])
    bounds.reverse()
    return tuple(pairwise(bounds))


def _slowest(prefix: Sequence[float], stages: int) -> float:
    """The cost of the slowest stage of the best cut; prefix[j] is the cost of the layers before j."""
    depth = len(prefix) - 1
    best = list(prefix)  # with one stage
    for s in range(2, stages + 1):
        # In place from the right: best[i] for i < j are still those of one stage less.
        for j in range(depth, s - 1, -1):
            best[j] = min(max(best[i], prefix[j] - prefix[i]) for i in range(s - 1, j))
    return best[depth]


def slowest_stage(costs: Sequence[float], cuts: Cuts) -> float:
    """The cost of the slowest stage: what a micro-batch costs a full pipeline."""
    return max(sum(costs[start:stop]) for start, stop in cuts)
