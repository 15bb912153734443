"""Workers made slow: by how much, in which steps, who, and that it changes nothing but the time."""

import time
from functools import partial
from pathlib import Path

import pytest
import torch
from tiny import Tiny, layout_of

from evenkeel.core.ids import INITIAL, WorkerId
from evenkeel.core.layout import WorkerInfo
from evenkeel.core.world import Source
from evenkeel.engine.job import Settings
from evenkeel.engine.local import run_static, static_world
from evenkeel.engine.slowdown import Slowdown, slowdown_for

CPU = torch.device("cpu")
TWO = [WorkerId("w0"), WorkerId("w1")]


def worked(seconds: float) -> float:
    """Computes for so long; how long it really was, in this thread's processor time."""
    began = time.thread_time()
    while time.thread_time() < began + seconds:
        pass
    return time.thread_time() - began


def factor_over(slowdown: Slowdown, step: int, passes: int) -> float:
    own, began = 0.0, time.thread_time()
    for _ in range(passes):
        mark = slowdown.begin()
        own += worked(0.002)
        slowdown.end(mark, step)
    return (time.thread_time() - began) / own


@pytest.mark.parametrize("factor", [1.5, 6.4])
def test_passes_take_so_many_times_as_long(factor: float) -> None:
    assert factor_over(Slowdown(factor), 1, 30) == pytest.approx(factor, rel=0.05)


@pytest.mark.parametrize(("step", "factor"), [(2, 1.0), (3, 4.0), (5, 4.0), (6, 1.0)])
def test_only_in_its_steps(step: int, factor: float) -> None:
    assert factor_over(Slowdown(4.0, 3, 5), step, 10) == pytest.approx(factor, rel=0.1)


def test_waiting_for_others_is_not_made_longer() -> None:
    slowdown = Slowdown(10.0)
    mark = slowdown.begin()
    time.sleep(0.2)
    began = time.thread_time()
    slowdown.end(mark, 1)
    assert time.thread_time() - began < 0.1


def test_a_slow_worker_stays_slow_and_who_comes_later_is_not() -> None:
    settings = Settings(0, 10, 8, 2, slowdown={1: 3.0}, slow_from=4)
    infos = [WorkerInfo(worker, "n", 1) for worker in (*TWO, "w2")]
    begins = static_world(infos, layout_of(TWO, [[0, 2]] * 2, 1, [2, 2]), 10)
    factors = [slowdown_for(worker, begins, settings, CPU).factor for worker in TWO]
    assert factors == [1.0, 3.0]
    layout = layout_of([WorkerId("w0"), WorkerId("w2")], [[0, 2]] * 2, 1, [2, 2])
    later = static_world(infos, layout, 10)
    object.__setattr__(later, "sources", (Source(TWO[0], layout.shard(TWO[0])),))
    assert later.base == INITIAL and slowdown_for(WorkerId("w2"), later, settings, CPU).factor == 1.0


@pytest.mark.parametrize(("cuts", "tensor"), [([[0, 4], [0, 4]], 1), ([[0, 2, 4]], 1), ([[0, 4]], 2)])
def test_the_losses_are_bitwise_those_of_an_undisturbed_run(tmp_path: Path, cuts: list[list[int]], tensor: int) -> None:
    layout = partial(layout_of, cuts=cuts, tensor=tensor, shares=[3, 1] if len(cuts) > 1 else [4])
    values, finals = [], []
    for slow in ({}, {"slowdown": {1: 6.4}, "slow_from": 2, "slow_to": 3}):
        folder = tmp_path / f"{len(slow)}"
        folder.mkdir()
        job = Tiny(folder, steps=5, settings={**slow, "eval_every": 2})
        values.append([report.vote.values for report in run_static(job, 2, layout, job.steps)])
        finals.append(job.final())
    assert values[0] == values[1]
    assert all(torch.equal(finals[0][name], finals[1][name]) for name in finals[0])
