"""Every layout trains what one process trains, to the last digits of float64."""

from functools import partial
from pathlib import Path

import pytest
from tiny import Tiny, difference, layout_of

from evenkeel.engine.local import run_static

LAYOUTS = {
    # name: (blocks, cuts of the pipelines over the layers, TP degree, shares of the 4 micro-batches, tied embeddings)
    "1x1x1": (2, [[0, 4]], 1, [4], False),
    "2x1x1": (2, [[0, 4], [0, 4]], 1, [2, 2], True),
    "1x2x1": (2, [[0, 2, 4]], 1, [4], True),
    "1x1x2": (2, [[0, 4]], 2, [4], False),
    "2x2x1": (2, [[0, 2, 4], [0, 2, 4]], 1, [3, 1], True),
    "2x1x2": (2, [[0, 4], [0, 4]], 2, [2, 2], True),
    "1x2x2": (2, [[0, 2, 4]], 2, [4], True),
    "2x2x2": (2, [[0, 2, 4], [0, 2, 4]], 2, [2, 2], True),
    "unequal": (7, [[0, 5, 9], [0, 3, 6, 9]], 1, [2, 2], False),
    "unequal, tied": (7, [[0, 5, 9], [0, 3, 6, 9]], 1, [3, 1], True),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_layout_trains_what_one_process_trains(name: str, tmp_path: Path) -> None:
    blocks, cuts, tensor, shares, tied = LAYOUTS[name]
    job = Tiny(tmp_path, blocks=blocks, tied=tied)
    workers = sum(len(cut) - 1 for cut in cuts) * tensor
    reports = run_static(job, workers, partial(layout_of, cuts=cuts, tensor=tensor, shares=shares), job.steps)
    losses, params = job.reference()
    assert [r.vote.step for r in reports] == list(range(1, job.steps + 1))
    for report, loss in zip(reports, losses, strict=True):
        assert report.vote.loss == pytest.approx(loss, rel=1e-10)
    assert difference(job.final(), params) < 1e-10
