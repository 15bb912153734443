import math
from random import Random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import minimize_scalar
from scipy.special import lambertw

from evenkeel.plan.interval import (
    USUAL,
    Rate,
    checkpoint_interval,
    duration,
    expected_slowdown,
    failure_rate,
    optimal_seconds,
)

RATIOS = st.floats(-12, 3).map(lambda exponent: 10.0**exponent)


@given(ratio=RATIOS, mean_s=st.floats(0.1, 1e7))
def test_nothing_else_is_better(ratio: float, mean_s: float) -> None:
    """Against scipy's minimiser of the expected time, which has no derivative and no closed form."""
    best_s = optimal_seconds(ratio * mean_s, mean_s)
    assert 0 < best_s <= mean_s
    if not 1e-8 < ratio < 100:
        return  # below, the minimum is flatter than a float can show; above, the time between losses is all there is
    found = minimize_scalar(
        lambda log_s: math.log(expected_slowdown(math.exp(log_s), ratio, 1.0)), bounds=(-25, 0.5), method="bounded"
    )
    here, there = (expected_slowdown(t, ratio, 1.0) for t in (best_s / mean_s, math.exp(found.x)))
    assert here <= there * (1 + 1e-12)


@given(ratio=RATIOS.filter(lambda ratio: ratio > 1e-6))
def test_the_closed_form(ratio: float) -> None:
    exact = 1 + lambertw(-math.exp(-ratio - 1)).real
    assert optimal_seconds(ratio, 1.0) == pytest.approx(exact, rel=1e-8)


@given(ratio=st.floats(-12, -4).map(lambda exponent: 10.0**exponent))
def test_young_is_the_first_order(ratio: float) -> None:
    """The next term of the series is -C / 3."""
    young = math.sqrt(2 * ratio)
    assert optimal_seconds(ratio, 1.0) == pytest.approx(young - 2 * ratio / 3, rel=10 * ratio + 1e-9)


def test_the_expected_time_is_what_a_simulation_takes() -> None:
    """Exponential losses at any time, also while restarting or writing; 40,000 checkpoints, seed 1."""
    random = Random(1)
    work, cost, mean, restart, segments = 30.0, 4.0, 50.0, 10.0, 40_000
    clock = 0.0
    for _ in range(segments):
        needs = work + cost
        while (loss := random.expovariate(1 / mean)) < needs:
            clock += loss
            needs = restart + work + cost
        clock += needs
    assert clock / (segments * work) == pytest.approx(expected_slowdown(work, cost, mean, restart), rel=0.01)


@pytest.mark.parametrize("restart_s", [0.0, 30.0])
def test_restarts_do_not_move_the_optimum(restart_s: float) -> None:
    best = min(range(1, 200), key=lambda t: expected_slowdown(t, 4.0, 50.0, restart_s))
    assert best == round(optimal_seconds(4.0, 50.0)) == 17


@given(cost_s=st.floats(1e-3, 10), step_s=st.floats(0.01, 100), mean_s=st.floats(100, 1e6))
def test_whole_steps(cost_s: float, step_s: float, mean_s: float) -> None:
    steps = checkpoint_interval(cost_s, step_s, Rate(1 / mean_s, "")).steps

    def slowdown(n: int) -> float:
        return expected_slowdown(n * step_s, cost_s, mean_s)

    assert steps >= 1
    assert all(slowdown(steps) <= slowdown(n) * (1 + 1e-12) for n in (max(1, steps - 1), steps + 1, 2 * steps))


def test_the_reason_gives_the_numbers() -> None:
    interval = checkpoint_interval(0.05, 0.2, failure_rate(1, 36000, 4))
    assert interval.steps == 179
    assert interval.reason == (
        "179 steps of 0.2 s: the optimum is 35.8 s between checkpoints that cost 0.05 s each, "
        "with one failure in 3.56 h on 4 workers (from 1 failure in 10 worker hours, and what is usual)"
    )


@given(failures=st.integers(0, 30), hours=st.floats(0, 1e6))
def test_the_rate_against_numeric_integration(failures: int, hours: float) -> None:
    """The posterior mean on a grid of rates: prior times likelihood, by the definitions."""
    rates = np.geomspace(1e-14, 1e3, 60_001)
    with np.errstate(under="ignore"):
        prior = sum(p * b * np.exp(-b * rates) for p, b in USUAL)
        logs = np.log(prior, where=prior > 0, out=np.full_like(prior, -np.inf))
        logs += failures * np.log(rates) - hours * rates
        posterior = np.exp(logs - logs.max())
    mean = np.trapezoid(posterior * rates**2, np.log(rates)) / np.trapezoid(posterior * rates, np.log(rates))
    assert failure_rate(failures, hours * 3600, 1).per_second * 3600 == pytest.approx(mean, rel=1e-4)


def test_what_is_usual_gives_way_to_what_is_seen() -> None:
    """Hours per failure of one worker, from steady machines to such as come and go."""

    def found(failures: int, hours: float) -> float:
        return failure_rate(failures, hours * 3600, 1).mean_seconds / 3600

    assert 4000 < found(0, 0) < 5000
    assert 40_000 < found(0, 1000) < 60_000
    assert found(3, 1) == pytest.approx(1.5, rel=0.01)
    assert found(100, 50_000) == pytest.approx(500, rel=0.02)
    assert failure_rate(0, 0, 16384).mean_seconds == pytest.approx(found(0, 0) * 3600 / 16384)


@pytest.mark.parametrize(("failures", "seconds", "workers"), [(-1, 1.0, 1), (0, -1.0, 1), (0, 1.0, 0)])
def test_observations_that_cannot_be(failures: int, seconds: float, workers: int) -> None:
    with pytest.raises(ValueError, match="a failure rate of"):
        failure_rate(failures, seconds, workers)


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.25, "0.25 s"), (90, "90 s"), (720, "12 min"), (12600, "3.5 h"), (1728000, "20 days")]
)
def test_durations_read_well(seconds: float, text: str) -> None:
    assert duration(seconds) == text


@pytest.mark.parametrize(("cost_s", "mean_s"), [(0.0, 1.0), (1.0, 0.0), (-1.0, 1.0), (math.nan, 1.0)])
def test_times_must_be_positive(cost_s: float, mean_s: float) -> None:
    with pytest.raises(ValueError, match="must be positive"):
        optimal_seconds(cost_s, mean_s)
