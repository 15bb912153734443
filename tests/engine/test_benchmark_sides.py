"""That the engine and its peers really do the same work, as the benchmarks assume: real processes, equal losses."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "jobs"))

from bench.sides import Side, static, torchrun
from bench.work import Steps, Work, check_same_work

STEPS = 8


@pytest.mark.parametrize(
    ("peer", "work"),
    [
        pytest.param("train_ddp.py", Work(STEPS, data=2), id="DDP", marks=pytest.mark.soak),
        pytest.param("train_pipelining.py", Work(STEPS, pipeline=2), id="pipelining"),
        pytest.param("train_dtensor.py", Work(STEPS, tensor=2), id="DTensor", marks=pytest.mark.soak),
    ],
)
def test_a_peer_has_the_engines_losses(peer: str, work: Work, tmp_path: Path) -> None:
    def run(make: Callable[[Work], Side], name: str) -> Steps:
        (tmp_path / name).mkdir()
        return make(work).run(tmp_path / name)

    ours = run(static, "ours")
    theirs = run(lambda w: torchrun("peer", peer, w), "theirs")
    assert check_same_work(ours, theirs, peer) < 1e-5
    assert len(ours.losses) == STEPS
    assert ours.losses[STEPS] < ours.losses[1], "it learns"
