"""How long a pipeline takes in 1F1B when its stages are not equally fast.

The passes of all stages and micro-batches with what they wait for are a graph, and the time is its longest path. Number
passes by x: forward pass m of any stage is at x = m, backward pass m of stage s at x = m + stages - 1 - s. Then a path
moves to the next stage at the same x (forward), to the stage before at x + 1 (backward), or stays in a stage, where
forward and backward pass at x follow one another and then those at x + 1. To go down some stages and come back up
costs the mean of their times per x, so a longest path stays where it is slowest: it fills the pipeline, goes to one
stage, stays there, and leaves it to drain the pipeline. `pipeline_s` is the largest over these stages and over the
ways to get there and away.
"""

from collections.abc import Sequence
from itertools import accumulate

from evenkeel.plan.workload import LayerTime


def pipeline_s(stages: Sequence[LayerTime], micros: int) -> float:
    """Seconds from the first forward pass to the last backward pass of 1F1B (plan/schedule.py).

    Equal to an event by event simulation where there are at least as many micro-batches as stages, or the stages are
    equal: then it is (micros + stages - 1) times a stage's time (Narayanan et al., "Efficient large-scale language
    model training on GPU clusters using Megatron-LM", 2021, section 2.2). Otherwise it is never below it.

    Args:
        stages: forward and backward seconds of one micro-batch, in order; what is sent is part of the pass before it.
        micros: the pipeline's micro-batches; 0 takes no time.

    Raises:
        ValueError: if there is no stage, or micros is negative.
    """
    if not stages or micros < 0:
        raise ValueError(f"{micros} micro-batches in {len(stages)} stages")
    if micros == 0:
        return 0.0
    longest = max(_stay(stages, c, micros) for c in range(len(stages)))
    return longest if micros >= len(stages) else min(longest, fill_and_pace_s(stages, micros))


def fill_and_pace_s(stages: Sequence[LayerTime], micros: int) -> float:
    """A simpler bound, never below `pipeline_s`: one micro-batch through all stages, the others at the slowest's pace.

    Exact if the stages are equal, or the last is the slowest in both passes. By this the planner shares out.
    """
    return sum(t.total_s for t in stages) + (micros - 1) * max(t.total_s for t in stages)


def _stay(stages: Sequence[LayerTime], c: int, micros: int) -> float:
    """The longest path that stays in stage c: to its first backward pass, from its last forward pass, and between."""
    depth, pace = len(stages), stages[c].total_s
    forward = [t.forward_s for t in stages]
    backward = [t.backward_s for t in stages]
    fill, drain = _ramp(forward), _ramp(backward)
    # Each way there ends with a backward pass of c at the x that is taken off at c's pace.
    ways = [fill[i] + sum(forward[i + 1 : c + 1]) + backward[c] - pace * (depth - 1 - i) for i in range(c + 1)]
    ways += [fill[i] + sum(backward[c : i + 1]) - pace * (depth - 1 - c) for i in range(c + 1, depth)]
    aways = [drain[i] + sum(backward[i + 1 : c + 1]) + forward[c] - pace * (c - i) for i in range(c + 1)]
    aways += [drain[i] + sum(forward[c : i + 1]) for i in range(c + 1, depth)]
    return max(ways) + max(aways) + (micros - 2) * pace


def _ramp(times: Sequence[float]) -> list[float]:
    """The longest way through as many passes as there are stages, by the last stage that it comes to."""
    depth = len(times)
    sums, peaks = accumulate(times), accumulate(times, max)
    return [total + (depth - 1 - i) * peak for i, (total, peak) in enumerate(zip(sums, peaks, strict=True))]
