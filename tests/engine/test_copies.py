"""Fewer owners of the optimizer state than pipelines: the same training, less memory (redundancy.copies)."""

from functools import partial
from pathlib import Path

import pytest
import torch
from tiny import Tiny, difference, layout_of

from evenkeel.engine.local import run_static

LAYOUTS = {
    # name: (blocks, cuts of the pipelines over the layers, TP degree, shares of the 4 micro-batches, tied embeddings)
    "3x1x1": (2, [[0, 4]] * 3, 1, [2, 1, 1], True),
    "2x2x1": (2, [[0, 2, 4], [0, 2, 4]], 1, [3, 1], True),
    "2x2x2": (2, [[0, 2, 4], [0, 2, 4]], 2, [2, 2], False),
    "unequal, tied": (7, [[0, 5, 9], [0, 3, 6, 9]], 1, [3, 1], True),
}


def trained(folder: Path, name: str, copies: int | None, precision: str) -> tuple[Tiny, dict[str, torch.Tensor]]:
    blocks, cuts, tensor, shares, tied = LAYOUTS[name]
    folder.mkdir()
    job = Tiny(folder, blocks=blocks, tied=tied, precision=precision)
    workers = sum(len(cut) - 1 for cut in cuts) * tensor
    layout = partial(layout_of, cuts=cuts, tensor=tensor, shares=shares)
    run_static(job, workers, layout, job.steps, copies=copies)
    return job, job.final()


@pytest.mark.parametrize("name", LAYOUTS)
def test_any_number_of_copies_trains_the_same(name: str, tmp_path: Path) -> None:
    job, expected = trained(tmp_path / "all", name, None, "fp64")
    assert difference(expected, job.reference()[1]) < 1e-10
    for copies in (1, 2):
        assert difference(trained(tmp_path / f"{copies}", name, copies, "fp64")[1], expected) < 1e-12


def test_under_bf16_only_owners_have_float32_parameters(tmp_path: Path) -> None:
    expected = trained(tmp_path / "all", "2x2x1", None, "bf16")[1]
    found = trained(tmp_path / "one", "2x2x1", 1, "bf16")[1]
    assert all(value.dtype == torch.float32 for value in found.values())
    assert difference(found, expected) < 1e-5
