"""What can be said without simulating: exact results, which the simulator must come to where they apply."""

from bisect import bisect_left
from fractions import Fraction
from math import comb

from evenkeel.plan.interval import expected_slowdown


def efficiency(work_s: float, cost_s: float, mean_s: float, restart_s: float = 0.0) -> float:
    """The share of time that is work, with a checkpoint after every `work_s` seconds of work and nothing else to go to.

    t / (M exp(R / M) (exp((t + C) / M) - 1)): Daly, "A higher order estimate of the optimum checkpoint interval for
    restart dumps", 2006, equation 13. Which interval is the best: plan.interval.optimal_seconds.

    Args:
        work_s: t, seconds of work between two checkpoints.
        cost_s: C, by how much a checkpoint delays the training.
        mean_s: M, mean time between failures, exponentially distributed; they come at any time.
        restart_s: R, from a failure to the next work.

    Raises:
        ValueError: if work_s or mean_s is not positive, or one of the others is negative.
    """
    if not (work_s > 0 and mean_s > 0 and cost_s >= 0 and restart_s >= 0):
        given = f"work {work_s} s, checkpoint {cost_s} s, mean time between failures {mean_s} s, restart {restart_s} s"
        raise ValueError(f"{given}: work and mean must be positive, the others not negative")
    try:
        return 1 / expected_slowdown(work_s, cost_s, mean_s, restart_s)
    except OverflowError:  # a failure comes so much sooner than a checkpoint that nothing is ever done
        return 0.0


def survival(nodes: int, lost: int, copies: int) -> float:
    """The probability that every slice of the state has a copy left, when so many of the nodes are lost at once.

    Nodes form groups of `copies`, and those of a group keep the same slices, as plan.copies places them: so it is the
    share of all choices of lost nodes that take no group whole, by inclusion and exclusion over the groups taken.
    Source: Wang et al., "Gemini: fast failure recovery in distributed training with in-memory checkpoints", 2023,
    which shows that no other placement of as many copies is better, and gives the first two terms.

    Raises:
        ValueError: if copies do not divide the nodes, or more are lost than there are.
    """
    if copies < 1 or nodes < 1 or nodes % copies or not 0 <= lost <= nodes:
        raise ValueError(f"{lost} of {nodes} nodes lost in groups of {copies}: these must be whole, and those be there")
    groups = nodes // copies
    kept = sum(
        (-1) ** taken * comb(groups, taken) * comb(nodes - taken * copies, lost - taken * copies)
        for taken in range(min(groups, lost // copies) + 1)
    )
    return float(Fraction(kept, comb(nodes, lost)))


def spares_needed(nodes: int, failures_per_node_day: float, repair_days: float, confidence: float) -> int:
    """The fewest spare nodes that are enough at a share `confidence` of all times.

    Nodes fail independently, each is replaced at once by a spare and comes back repaired: the number in repair is
    Poisson with mean nodes * rate * repair time, however repair times are distributed (Palm's theorem; Palm, "Analysis
    of the Erlang traffic formulae for busy-signal arrangements", 1938).

    Raises:
        ValueError: if there are no nodes, a rate or time is negative, more than 1e15 nodes are in repair, or the
            confidence is not below 1.
    """
    if nodes < 1 or not failures_per_node_day >= 0 or not repair_days >= 0 or not 0 < confidence < 1:
        given = f"{nodes} nodes, {failures_per_node_day} failures per node-day, {repair_days} days of repair"
        raise ValueError(f"{given}, confidence {confidence}: what is expected is a confidence between 0 and 1")
    from scipy.special import pdtr  # a third of a second, which only this needs

    mean = nodes * failures_per_node_day * repair_days
    if not mean < 1e15:
        raise ValueError(f"{mean:g} nodes in repair at the same time; fewer than 1e15 can be counted")
    most = 1
    while pdtr(most, mean) < confidence:
        most *= 2
    return bisect_left(range(most), confidence, key=lambda spares: float(pdtr(spares, mean)))
