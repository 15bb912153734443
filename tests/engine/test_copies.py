"""Fewer owners of the optimizer state than pipelines: the same training, less memory (redundancy.copies)."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from tiny import Tiny, difference, layout_of

from evenkeel.control.policy import Policy
from evenkeel.core.ids import NodeId
from evenkeel.core.layout import Layout, WorkerInfo
from evenkeel.core.world import World
from evenkeel.engine import local
from evenkeel.engine.faults import FaultPlan
from evenkeel.engine.local import LocalRun, Outcome, run_static
from evenkeel.engine.model import model_shape
from evenkeel.plan.layout import Wish

LAYOUTS = {
    # name: (blocks, cuts of the pipelines over the layers, TP degree, shares of the 4 micro-batches, tied embeddings)
    "3x1x1": (2, [[0, 4]] * 3, 1, [2, 1, 1], True),
    "2x1x1, one idle": (2, [[0, 4], [0, 4]], 1, [4, 0], True),
    "2x2x1": (2, [[0, 2, 4], [0, 2, 4]], 1, [3, 1], True),
    "2x2x2": (2, [[0, 2, 4], [0, 2, 4]], 2, [2, 2], False),
    "unequal, tied": (7, [[0, 5, 9], [0, 3, 6, 9]], 1, [3, 1], True),
}


def trained(folder: Path, name: str, copies: int | None, precision: str) -> tuple[Tiny, dict[str, torch.Tensor]]:
    blocks, cuts, tensor, shares, tied = LAYOUTS[name]
    folder.mkdir()
    job = Tiny(folder, blocks=blocks, tied=tied, precision=precision, steps=8)
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


ACROSS = {
    # name: (as in LAYOUTS, and the nodes of the workers by rank)
    "3x1x2": ((2, [[0, 4]] * 3, 2, [2, 1, 1], False), "acbdae"),
    "unequal, tied, TP 2": ((3, [[0, 5], [0, 2, 5], [0, 5]], 2, [2, 1, 1], True), "acbdbdae"),
}


@pytest.mark.parametrize("name", ACROSS)
def test_tp_groups_over_nodes_train_the_same(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Copies of TP rank 0 share nodes, those of rank 1 do not: both take over rank 0's sums, so both own the same."""
    config, nodes = ACROSS[name]
    monkeypatch.setitem(LAYOUTS, name, config)
    plain = local.static_world

    def spread(infos: Sequence[WorkerInfo], layout: Layout, last_step: int) -> World:
        world = plain(infos, layout, last_step)
        on = zip(world.layout.members, map(NodeId, nodes), strict=True)
        return replace(world, nodes=tuple(on))

    monkeypatch.setattr(local, "static_world", spread)
    job, expected = trained(tmp_path / "all", name, None, "fp64")
    assert difference(expected, job.reference()[1]) < 1e-10
    for copies in (1, 2):
        assert difference(trained(tmp_path / f"{copies}", name, copies, "fp64")[1], expected) < 1e-12


def test_under_bf16_only_owners_have_float32_parameters(tmp_path: Path) -> None:
    expected = trained(tmp_path / "all", "2x2x1", None, "bf16")[1]
    found = trained(tmp_path / "one", "2x2x1", 1, "bf16")[1]
    assert all(value.dtype == torch.float32 for value in found.values())
    assert difference(found, expected) < 1e-5


def healed(folder: Path, copies: int, faults: tuple[FaultPlan, ...], spares: int = 1) -> tuple[Outcome, Tiny]:
    """Three pipelines in fp32."""
    folder.mkdir()
    job = Tiny(folder, precision="fp32", steps=8, tied=True, faults=faults)
    wish = Wish(data=3, pipeline=1, tensor=1, min_workers=1, max_workers=3)
    return LocalRun(job, Policy(model_shape(job.model()), wish, 4, job.steps, spares, copies=copies)).run(), job


def test_with_two_copies_any_death_loses_nothing(tmp_path: Path) -> None:
    outcome, job = healed(tmp_path / "undisturbed", 2, ())
    losses, params = outcome.losses, job.final()
    deaths = [("backward", 0), ("after_vote", 1), ("commit", 2)]
    for phase, rank in deaths:
        fault = FaultPlan(0, 4, phase, f"rank:{rank}", "kill")
        outcome, job = healed(tmp_path / phase, 2, (fault,))
        assert (outcome.status, outcome.error) == ("finished", "")
        assert len(outcome.named("worker_lost")) == 1
        assert outcome.losses == losses
        assert all(torch.equal(job.final()[name], value) for name, value in params.items())
        assert [line.vote.step for line in outcome.metrics] == list(range(1, 9))


def test_without_a_spare_the_parts_are_dealt_anew(tmp_path: Path) -> None:
    expected = healed(tmp_path / "undisturbed", 2, (), spares=0)[0].losses
    outcome, _ = healed(tmp_path / "shrinks", 2, (FaultPlan(0, 4, "reduce", "rank:1", "kill"),), spares=0)
    assert (outcome.status, outcome.error) == ("finished", "")
    assert [world.size for world in outcome.worlds][:2] == [3, 2]
    assert [world.copies for world in outcome.worlds][:2] == [2, None]
    assert outcome.losses == pytest.approx(expected, rel=1e-5)


def test_with_one_copy_a_death_loses_what_nobody_else_has(tmp_path: Path) -> None:
    """Without a store there is nothing to go back to."""
    outcome, _ = healed(tmp_path / "one", 1, (FaultPlan(0, 4, "forward", "rank:2", "kill"),))
    assert outcome.status == "failed"
    assert "step 3 is lost: nobody alive holds " in outcome.error
