"""How the micro-batches of a step are shared out over pipelines of unequal speed."""

from collections.abc import Sequence
from heapq import heapify, heapreplace
from math import isfinite


def shares(
    times: Sequence[float], micro_batches: int, minimum: int = 0, offsets: Sequence[float] | None = None
) -> tuple[int, ...]:
    """Shares of the micro-batches that make the slowest finish as early as it can be.

    Pipeline i with k > 0 micro-batches finishes at offsets[i] + k * times[i], one without any at 0. The offset is
    what a pipeline pays once per step however much it does: in 1F1B and GPipe the time that a micro-batch takes in
    all stages but the slowest, sum(stages) - slowest, for filling and draining (the bubble).

    Each micro-batch in turn goes where it finishes first. That is exact: when the one that sets the slowest finish is
    given out, every pipeline's next one would finish no earlier, so an earlier finish could not place as many.
    Ties go to the pipeline that comes first, so equal pipelines differ by at most one, the first ones having more.

    Args:
        times: time per micro-batch of each pipeline's slowest stage; positive.
        micro_batches: how many there are to share.
        minimum: what each pipeline gets at least.
        offsets: in the unit of `times`, not negative; default none.

    Raises:
        ValueError: if there is no pipeline, a time is not positive and finite, an offset is negative or not finite,
            or there are too few micro-batches for the minimum.
    """
    offsets = (0.0,) * len(times) if offsets is None else offsets
    if not times or len(offsets) != len(times):
        raise ValueError(f"{len(times)} pipelines with {len(offsets)} offsets")
    if not all(isfinite(t) and t > 0 for t in times) or not all(isfinite(o) and o >= 0 for o in offsets):
        raise ValueError(f"times must be positive and offsets not negative, both finite: {times}, {offsets}")
    if minimum < 0 or micro_batches < minimum * len(times):
        raise ValueError(f"{micro_batches} micro-batches do not give {len(times)} pipelines at least {minimum} each")
    counts = [minimum] * len(times)
    finishes = [(o + (minimum + 1) * t, i) for i, (t, o) in enumerate(zip(times, offsets, strict=True))]
    heapify(finishes)
    for _ in range(micro_batches - minimum * len(times)):
        i = finishes[0][1]
        counts[i] += 1
        heapreplace(finishes, (offsets[i] + (counts[i] + 1) * times[i], i))
    return tuple(counts)


def slowest_finish(times: Sequence[float], counts: Sequence[int], offsets: Sequence[float]) -> float:
    """When the last pipeline is done, in the unit of `times`; see `shares`."""
    return max((o + k * t for t, k, o in zip(times, counts, offsets, strict=True) if k), default=0.0)
