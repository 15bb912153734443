"""The learning rate of a step: a pure function, for the workers that use it and the controller that logs it."""

from math import cos, pi

FLOOR = 0.1
"""Share of the peak learning rate that the schedules "cosine" and "linear" end at."""
SCHEDULES = ("cosine", "linear", "constant")


def learning_rate(step: int, *, peak: float, warmup: int, last: int, schedule: str) -> float:
    """Linear warm-up to `peak`, then the schedule down to a tenth of it.

    Args:
        step: counts from 1.
        warmup: steps; step `warmup` is the first with `peak`.
        last: the step that ends at the floor, train.steps.
        schedule: "cosine" (Loshchilov and Hutter, 2017), "linear" or "constant".

    Raises:
        ValueError: for another schedule.
    """
    if schedule not in SCHEDULES:
        raise ValueError(f"train.schedule is {schedule!r}; expected one of {', '.join(SCHEDULES)}")
    if step <= warmup:
        return peak * step / warmup
    if schedule == "constant":
        return peak
    done = min(1.0, (step - warmup) / max(1, last - warmup))
    left = 0.5 * (1 + cos(pi * done)) if schedule == "cosine" else 1 - done
    return peak * (FLOOR + (1 - FLOOR) * left)
