"""How often to write a checkpoint: the optimum for what one costs and how often one is needed."""

from dataclasses import dataclass
from math import exp, expm1, log, log1p, sqrt

USUAL = ((0.999, 50_000.0), (0.001, 5.0))
"""What is believed before a run has seen failures of its own: (probability, hours of one worker until it fails).

Steady machines: 419 unexpected interruptions in 54 days on 16,384 GPUs, one in 50,700 GPU-hours (Llama Team, "The
Llama 3 Herd of Models", 2024, section 3.3.4). And, little believed at first, machines that come and go within hours.
"""


@dataclass(frozen=True, slots=True)
class Rate:
    """How often something fails, per second, and where the number comes from."""

    per_second: float
    reason: str

    @property
    def mean_seconds(self) -> float:
        """Between two failures."""
        return 1 / self.per_second


@dataclass(frozen=True, slots=True)
class Interval:
    """Steps between two checkpoints, and why so many."""

    steps: int
    reason: str


def failures_per_second(failures: int, worker_seconds: float, workers: int) -> float:
    """The rate at which a world of so many workers fails, from what was observed and what is usual.

    The number of failures in a given time is taken as Poisson; the prior on the rate of one worker is a mixture of
    Gamma(1, hours) by `USUAL`, and the result its posterior mean. A single Gamma that knows steady machines would need
    their hours to unlearn, so that three failures in the first hour would change next to nothing.

    Args:
        failures: that were observed; count those that need a checkpoint where the question is how often to write one.
        worker_seconds: observed time, summed over the workers.

    Raises:
        ValueError: if something is negative, or there is no worker.
    """
    hours = worker_seconds / 3600
    if failures < 0 or not hours >= 0 or workers < 1:
        raise ValueError(f"a failure rate of {failures} failures in {hours:g} worker hours, for {workers} workers")
    # The likelihood under Gamma(1, b), without what all have in common, is b / (b + t)^(k + 1); b + t is at least 5.
    logs = [log(p * b) - (failures + 1) * log(b + hours) for p, b in USUAL]
    weights = [exp(value - max(logs)) for value in logs]
    means = [(1 + failures) / (b + hours) for _, b in USUAL]
    return workers * sum(w * m for w, m in zip(weights, means, strict=True)) / sum(weights) / 3600


def failure_rate(failures: int, worker_seconds: float, workers: int) -> Rate:
    """`failures_per_second`, with the reason in words."""
    per_second = failures_per_second(failures, worker_seconds, workers)
    hours = worker_seconds / 3600
    seen = f"{failures} {'failure' if failures == 1 else 'failures'} in {hours:.3g} worker hours, and what is usual"
    return Rate(per_second, f"one failure in {duration(1 / per_second)} on {workers} workers (from {seen})")


def optimal_seconds(cost_s: float, mean_s: float) -> float:
    """Seconds of work between two checkpoints that make the expected run time the shortest.

    The exact optimum of `expected_slowdown`: t = M (1 + W(-exp(-C / M - 1))) with Lambert's W, or the root u = t / M
    of -u - log(1 - u) = C / M, which is solved here by Newton's method, as 1 + W loses half its digits where C is far
    below M. To first order it is sqrt(2 C M) (Young, "A first order approximation to the optimum checkpoint interval",
    1974). The time that a restart takes does not matter. Source: Daly, "A higher order estimate of the optimum
    checkpoint interval for restart dumps", 2006, equation 20 and what leads to it.

    Args:
        cost_s: C, by how much a checkpoint delays the training.
        mean_s: M, mean time between losses that only a checkpoint makes good; exponentially distributed.

    Raises:
        ValueError: if one of them is not positive.
    """
    if not (cost_s > 0 and mean_s > 0):
        raise ValueError(f"a checkpoint that costs {cost_s} s, against a loss every {mean_s} s: both must be positive")
    x = cost_s / mean_s
    # Both are at least the root, where the left side is convex: so Newton's steps only go down, and end there.
    u = min(sqrt(2 * x), -expm1(-1 - x))
    while u < 1:
        step = (-u - log1p(-u) - x) * (1 - u) / u
        if step <= 1e-15 * u:
            break
        u -= step
    return u * mean_s


def expected_slowdown(work_s: float, cost_s: float, mean_s: float, restart_s: float = 0.0) -> float:
    """Expected run time over the time of the work itself, with a checkpoint after every `work_s` seconds of work.

    M exp(R / M) (exp((t + C) / M) - 1) / t: a loss takes back everything since the last checkpoint, also while one is
    written or a restart of R seconds is under way (Daly 2006, equation 13).
    """
    return mean_s * exp(restart_s / mean_s) * expm1((work_s + cost_s) / mean_s) / work_s


def steps_between(cost_s: float, step_s: float, mean_s: float) -> int:
    """The best whole number of steps between two checkpoints, at least 1.

    Args:
        cost_s, mean_s: as in `optimal_seconds`.

    Raises:
        ValueError: if a time is not positive.
    """
    if not step_s > 0:
        raise ValueError(f"a step takes {step_s} s; it must be positive")
    fewer = max(1, int(optimal_seconds(cost_s, mean_s) / step_s))
    return min(fewer, fewer + 1, key=lambda n: expected_slowdown(n * step_s, cost_s, mean_s))


def checkpoint_interval(cost_s: float, step_s: float, failures: Rate) -> Interval:
    """`steps_between`, with the reason in words."""
    steps = steps_between(cost_s, step_s, failures.mean_seconds)
    best_s = optimal_seconds(cost_s, failures.mean_seconds)
    return Interval(
        steps,
        f"{steps} steps of {duration(step_s)}: the optimum is {duration(best_s)} between checkpoints that cost "
        f"{duration(cost_s)} each, with {failures.reason}",
    )


def duration(seconds: float) -> str:
    """For reading: "0.25 s", "12 min", "3.5 h", "20 days"."""
    for unit, size in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds:.3g} s"
