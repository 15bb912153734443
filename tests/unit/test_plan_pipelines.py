import random
from statistics import mean

import pytest

from evenkeel.plan.pipelines import fill_and_pace_s, pipeline_s
from evenkeel.plan.schedule import Kind, one_f_one_b
from evenkeel.plan.workload import LayerTime


def simulated_s(stages: list[LayerTime], micros: int) -> float:
    """1F1B event by event: each stage goes through its list, and waits for what the neighbours have not done yet."""
    waiting = [list(one_f_one_b(s, len(stages), micros)) for s in range(len(stages))]
    free = [0.0] * len(stages)
    done: dict[tuple[Kind, int, int], float] = {}
    while any(waiting):
        before = len(done)
        for s, actions in enumerate(waiting):
            while actions:
                kind, micro = actions[0].kind, actions[0].micro
                ahead = s - 1 if kind is Kind.FORWARD else s + 1
                if 0 <= ahead < len(stages) and (kind, ahead, micro) not in done:
                    break
                takes = stages[s].forward_s if kind is Kind.FORWARD else stages[s].backward_s
                free[s] = max(free[s], done.get((kind, ahead, micro), 0.0)) + takes
                done[kind, s, micro] = free[s]
                actions.pop(0)
        assert len(done) > before, "stages wait for each other"
    return max(free)


def random_stages(rng: random.Random) -> list[LayerTime]:
    return [LayerTime(rng.uniform(0.5, 2), rng.uniform(1, 4)) for _ in range(rng.randint(2, 8))]


def test_against_an_event_level_simulation() -> None:
    """1,000 pipelines of 2 to 8 stages, forward and backward times random per stage, 1 to 64 micro-batches."""
    rng = random.Random(4)
    excess = []
    for _ in range(1000):
        stages, micros = random_stages(rng), rng.randint(1, 64)
        real, closed = simulated_s(stages, micros), pipeline_s(stages, micros)
        excess.append(closed / real - 1)
        assert closed >= real * (1 - 1e-12)
        assert fill_and_pace_s(stages, micros) >= closed * (1 - 1e-12)
        if micros >= len(stages):
            assert closed == pytest.approx(real, rel=1e-12)
    assert mean(excess) <= 0.005


def test_the_planners_bound_is_near_the_simulation() -> None:
    """What shares are given out by: 3 % on the mean of 1,000, with at least as many micro-batches as stages."""
    rng = random.Random(5)
    excess = []
    for _ in range(1000):
        stages = random_stages(rng)
        micros = rng.randint(len(stages), 64)
        excess.append(fill_and_pace_s(stages, micros) / simulated_s(stages, micros) - 1)
    assert min(excess) >= -1e-12
    assert mean(excess) <= 0.03


@pytest.mark.parametrize("depth", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("micros", [1, 2, 3, 7, 30])
def test_exact_for_equal_stages(depth: int, micros: int) -> None:
    stages = [LayerTime(0.7, 1.9)] * depth
    expected = (micros + depth - 1) * 2.6
    assert pipeline_s(stages, micros) == pytest.approx(expected, rel=1e-12)
    assert fill_and_pace_s(stages, micros) == pytest.approx(expected, rel=1e-12)
    assert simulated_s(stages, micros) == pytest.approx(expected, rel=1e-12)


def test_by_hand() -> None:
    """The first stage: forward 0 to 2 and 2 to 4, backward 4 to 6 and 6 to 8; the second is done within that."""
    stages = [LayerTime(2, 2), LayerTime(1, 1)]
    assert pipeline_s(stages, 2) == 8
    assert fill_and_pace_s(stages, 2) == 10


def test_out_of_range() -> None:
    assert pipeline_s([LayerTime(1, 1)], 0) == 0
    with pytest.raises(ValueError, match="-1 micro-batches in 1 stages"):
        pipeline_s([LayerTime(1, 1)], -1)
    with pytest.raises(ValueError, match="in 0 stages"):
        pipeline_s([], 1)
