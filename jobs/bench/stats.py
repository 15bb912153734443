"""Statistics of repeated measurements: medians, and when a bound holds."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

Better = Literal[">=", "<="]

INTERVAL_RUNS = 15
"""From so many interleaved pairs on, a ratio is decided by the interval of its median instead of the median itself."""


@dataclass(frozen=True, slots=True)
class Interval:
    """A confidence interval; both ends belong to it."""

    low: float
    high: float


def bootstrap_median(values: Sequence[float], *, level: float = 0.95, resamples: int = 10_000) -> Interval:
    """The percentile bootstrap interval of the median (Efron and Tibshirani, An Introduction to the Bootstrap, 13.3).

    The resampling has a fixed seed: the same measurements always give the same verdict.

    Raises:
        ValueError: without a measurement.
    """
    if not values:
        raise ValueError("no measurement to resample")
    data = np.asarray(values, dtype=np.float64)
    picks = np.random.default_rng(0).integers(0, len(data), (resamples, len(data)))
    medians = np.median(data[picks], axis=1)
    low, high = np.quantile(medians, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(low), float(high))


def meets(value: float, better: Better, bound: float) -> bool:
    """Whether `value` is on the good side of `bound`, or on it."""
    return value >= bound if better == ">=" else value <= bound


def ratio_meets(ratios: Sequence[float], better: Better, bound: float) -> bool:
    """Whether a ratio of paired runs keeps to `bound`.

    With INTERVAL_RUNS pairs or more the bound may lie within the 95 % interval of their median: noise alone must not
    decide on a ratio near 1. With fewer the interval says little, and the median itself must keep to it.
    """
    if len(ratios) < INTERVAL_RUNS:
        return meets(float(np.median(ratios)), better, bound)
    interval = bootstrap_median(ratios)
    return meets(interval.high if better == ">=" else interval.low, better, bound)
