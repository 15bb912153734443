"""That the engine and its peers really do the same work, as the benchmarks assume: real processes, equal losses."""

import sys
from pathlib import Path

import pytest
from static_runs import train

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "jobs"))

from bench.sides import torchrun
from bench.work import Work, check_same_work

STEPS = 8
SMALL: dict[str, object] = {"d_model": 64, "layers": 2, "seq_len": 32}


@pytest.mark.parametrize(
    ("peer", "work"),
    [
        pytest.param("train_ddp.py", Work(STEPS, data=2, model=SMALL), id="DDP"),
        pytest.param(
            "train_pipelining.py", Work(STEPS, pipeline=2, model=SMALL), id="pipelining", marks=pytest.mark.soak
        ),
        pytest.param("train_dtensor.py", Work(STEPS, tensor=2, model=SMALL), id="DTensor", marks=pytest.mark.soak),
    ],
)
def test_a_peer_has_the_engines_losses(peer: str, work: Work, tmp_path: Path) -> None:
    """Of the two in the soak: that the executor gives the gradients of torch's own 1F1B is shown by test_pipeline.py,
    and that a TP group trains what one process does by test_same_run.py."""
    ours = train(work, tmp_path / "ours")
    (tmp_path / "theirs").mkdir()
    theirs = torchrun("peer", peer, work).run(tmp_path / "theirs")
    assert check_same_work(ours, theirs, peer) < 1e-5
    assert len(ours.losses) == STEPS
    assert ours.losses[STEPS] < ours.losses[1], "it learns"
