"""Mirrors: what only one worker keeps is in another's memory too (redundancy.mirror_every)."""

from pathlib import Path

import pytest
import torch
from tiny import Tiny

from evenkeel.control.policy import Policy
from evenkeel.engine.faults import FaultPlan
from evenkeel.engine.local import LocalRun, Outcome
from evenkeel.engine.model import model_shape
from evenkeel.plan.layout import Wish

STEPS = 12


def trained(
    folder: Path, faults: tuple[FaultPlan, ...] = (), *, every: int = 2, wish: Wish | None = None,
    copies: int | None = None, spares: int = 1, precision: str = "fp32", tied: bool = True,
) -> tuple[Outcome, Tiny]:  # fmt: skip
    """One pipeline of two stages, unless `wish` says otherwise."""
    folder.mkdir()
    job = Tiny(folder, precision=precision, steps=STEPS, tied=tied, faults=faults)
    wish = wish or Wish(data=1, pipeline=2, tensor=1, min_workers=2, max_workers=2)
    policy = Policy(model_shape(job.model()), wish, 4, STEPS, spares, copies=copies, mirror_every=every)
    return LocalRun(job, policy).run(), job


def kill(phase: str, rank: int, step: int, index: int = 0) -> FaultPlan:
    return FaultPlan(index, step, phase, f"rank:{rank}", "kill")


def last_of_each_step(outcome: Outcome) -> list[float | None]:
    """Losses by step; of a step that was committed again the last one counts."""
    losses = {line.vote.step: line.vote.loss for line in outcome.metrics}
    assert sorted(losses) == list(range(1, STEPS + 1))
    return [losses[step] for step in sorted(losses)]


def bases(outcome: Outcome) -> list[int]:
    return [line.fields["base"] for line in outcome.named("restored")]


def check_same(found: tuple[Outcome, Tiny], expected: tuple[Outcome, Tiny]) -> None:
    outcome, job = found
    assert (outcome.status, outcome.error) == ("finished", "")
    assert last_of_each_step(outcome) == expected[0].losses
    assert all(torch.equal(job.final()[name], value) for name, value in expected[1].final().items())


@pytest.fixture(scope="module", params=["fp32", "bf16"])
def undisturbed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Outcome, Tiny]:
    return trained(tmp_path_factory.mktemp("mirrors") / "undisturbed", precision=request.param)


@pytest.mark.parametrize(("phase", "rank"), [("backward", 0), ("after_vote", 1), ("commit", 0), ("before_vote", 1)])
def test_a_death_goes_back_no_further_than_to_the_mirrors(
    phase: str, rank: int, undisturbed: tuple[Outcome, Tiny], tmp_path: Path
) -> None:
    """Bit by bit the same run, although nobody else had what the dead worker had, and there is no store."""
    found = trained(tmp_path / "run", (kill(phase, rank, 8),), precision=undisturbed[1].precision)
    check_same(found, undisturbed)
    assert bases(found[0]) in ([4], [6])
    assert len(found[0].named("worker_lost")) == 1


def test_two_deaths_one_after_the_other(undisturbed: tuple[Outcome, Tiny], tmp_path: Path) -> None:
    """The second hits the one who kept all at the first: both places had been filled again."""
    faults = (kill("forward", 1, 6), kill("reduce", 0, 10, index=1))
    found = trained(tmp_path / "run", faults, spares=2, precision=undisturbed[1].precision)
    check_same(found, undisturbed)
    assert len(bases(found[0])) == 2


def test_one_copy_and_a_mirror(tmp_path: Path) -> None:
    """ZeRO-1 over three pipelines: every worker has a third of the state, and another one's in its host memory."""
    wish = Wish(data=3, pipeline=1, tensor=1, min_workers=3, max_workers=3)
    expected = trained(tmp_path / "undisturbed", wish=wish, copies=1)
    found = trained(tmp_path / "run", (kill("backward", 2, 6),), wish=wish, copies=1)
    check_same(found, expected)
    assert bases(found[0]) in ([2], [4])


def test_tensor_parallel(tmp_path: Path) -> None:
    """Parameters that all tensor-parallel ranks have belong to the snapshots of each."""
    wish = Wish(data=1, pipeline=1, tensor=2, min_workers=2, max_workers=2)
    expected = trained(tmp_path / "undisturbed", wish=wish, tied=False)
    found = trained(tmp_path / "run", (kill("commit", 1, 6),), wish=wish, tied=False)
    check_same(found, expected)


def test_whoever_has_a_live_copy_needs_none(tmp_path: Path) -> None:
    wish = Wish(data=2, pipeline=1, tensor=1, min_workers=1, max_workers=2)
    outcome, _ = trained(tmp_path / "run", (kill("backward", 1, 5),), wish=wish)
    assert (outcome.status, bases(outcome)) == ("finished", [])
    assert [world.mirror_every for world in outcome.worlds] == [None] * len(outcome.worlds)


def test_without_mirrors_it_is_lost(tmp_path: Path) -> None:
    outcome, _ = trained(tmp_path / "run", (kill("backward", 1, 5),), every=0)
    assert outcome.status == "failed"
    assert "step 4 is lost: nobody alive holds " in outcome.error
