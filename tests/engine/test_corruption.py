"""A bit that flips in one worker's optimizer state: real processes, and the run is the same run."""

from pathlib import Path

import pytest
import torch
from test_saver import Saved, Shell
from test_saver import policy as two_by_two
from tiny import wait_for_file

from evenkeel.control import messages as m
from evenkeel.control.policy import Policy
from evenkeel.engine.faults import FaultPlan
from evenkeel.engine.local import LocalRun, Outcome
from evenkeel.engine.model import model_shape
from evenkeel.plan.layout import Wish

STEPS = 12


class InTurn(Saved):
    """A bit flips only after the one planned before it has flipped, in a step that is run again."""

    def fault_once(self, index: int) -> bool:
        return (index == 0 or (self.folder / f"fault-{index - 1}").exists()) and super().fault_once(index)


def run(folder: Path, workers: int, *flips: int, copies: int | None = None, spares: int = 0) -> tuple[Outcome, Saved]:
    """Checkpoints of steps 3, 6, 9 and 12; copies are compared in steps 1, 4, 5, 7, 10 and 12.

    Args:
        flips: in the commits of these steps a bit flips in rank 1's state, so that theirs is the first wrong version.
    """
    folder.mkdir()
    faults = tuple(FaultPlan(i, step, "commit", "rank:1", "flip") for i, step in enumerate(flips))
    job = InTurn(folder, precision="fp32", steps=STEPS, tied=True, faults=faults)
    wish = Wish(data=workers, pipeline=1, tensor=1, min_workers=workers, max_workers=workers)
    policy = Policy(
        model_shape(job.model()), wish, 4, STEPS, spares, copies=copies, checkpoint_every=3, compare_every=5
    )
    return Shell(job, policy).run(), job


def same(job: Saved, other: Saved) -> bool:
    ours, theirs = job.final(), other.final()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_of_three_copies_the_odd_one_is_replaced(tmp_path: Path) -> None:
    _, undisturbed = run(tmp_path / "undisturbed", 3)
    outcome, job = run(tmp_path / "flipped", 3, 4, spares=1)
    assert (outcome.status, outcome.error) == ("finished", "")
    victim = outcome.worlds[0].layout.members[1]
    [line] = outcome.named("divergence")
    assert (line.step, line.fields["workers"]) == (4, [victim])
    [lost] = outcome.named("worker_lost")
    assert lost.fields["worker_id"] == victim
    assert lost.fields["cause"].startswith("silent corruption: its copy of ")
    assert [world.cause for world in outcome.worlds] == ["start", "silent corruption"]
    assert victim not in outcome.worlds[1].layout.members
    assert [metrics.vote.step for metrics in outcome.metrics] == list(range(1, STEPS + 1))
    assert same(job, undisturbed)


@pytest.mark.parametrize(("workers", "copies"), [(2, None), (3, 2)], ids=["two workers", "two copies on three workers"])
def test_of_two_copies_none_counts_and_the_run_goes_back(workers: int, copies: int | None, tmp_path: Path) -> None:
    """Not to the checkpoint of step 6, the first that is wrong."""
    _, undisturbed = run(tmp_path / "undisturbed", workers, copies=copies)
    outcome, job = run(tmp_path / "flipped", workers, 6, copies=copies)
    assert (outcome.status, outcome.error) == ("finished", "")
    [line] = outcome.named("divergence")
    members = outcome.worlds[0].layout.members
    assert line.step == 6
    assert members[1] in line.fields["workers"]
    assert len(line.fields["workers"]) >= 2
    assert outcome.named("worker_lost") == []
    [back] = outcome.named("restored")
    assert back.fields["base"] == 3
    assert [m.vote.step for m in outcome.metrics] == [*range(1, 7), *range(4, STEPS + 1)]
    assert same(job, undisturbed)


def test_twice_in_a_row_ends_the_run_and_names_the_workers(tmp_path: Path) -> None:
    outcome, _ = run(tmp_path / "flipped", 2, 6, 5)
    assert outcome.status == "failed"
    members = outcome.worlds[0].layout.members
    assert "again after the run went back, copies of step 6 differ" in outcome.error
    assert all(worker in outcome.error for worker in members)


class AfterTheCheckpoint(Saved):
    """Who is to die waits until the checkpoint of step 6 is complete."""

    def fault_once(self, index: int) -> bool:
        if index > 0:
            wait_for_file(self.folder / "complete-6")
        return super().fault_once(index)


def run_two_stages(folder: Path, *faults: FaultPlan) -> tuple[Outcome, Saved]:
    """Two copies of two stages: ranks 0 and 2 hold the first, 1 and 3 the second."""
    folder.mkdir()
    job = AfterTheCheckpoint(folder, precision="fp32", steps=STEPS, faults=faults)

    def watch(_: LocalRun, event: m.Event) -> None:
        if isinstance(event, m.CheckpointCommitted):
            (folder / f"complete-{event.version.step}").touch()

    return Shell(job, two_by_two(job, 3, spares=2, compare_every=5), watch=watch).run(), job


def test_a_wrong_copy_that_was_saved_is_found_by_who_kept_the_other(tmp_path: Path) -> None:
    """All who hold the second stage die in the step after the checkpoint of 6, so that the next world is read from it.
    Who holds the first keeps that. As the copies differ then, that checkpoint is what may be wrong."""
    _, undisturbed = run_two_stages(tmp_path / "undisturbed")
    outcome, job = run_two_stages(
        tmp_path / "flipped",
        FaultPlan(0, 6, "commit", "rank:0", "flip"),
        FaultPlan(1, 7, "forward", "rank:1", "kill"),
        FaultPlan(2, 7, "forward", "rank:3", "kill"),
    )
    assert (outcome.status, outcome.error) == ("finished", "")
    first = outcome.worlds[0].layout.members
    assert [(world.base.step, world.saved) for world in outcome.worlds] == [(0, False), (6, True), (3, True)]
    [line] = outcome.named("divergence")
    assert (line.step, line.fields["workers"]) == (6, [first[0], first[2]])
    assert [e.fields["checkpoint"] for e in outcome.named("checkpoint_distrusted")] == [6]
    assert [e.fields["base"] for e in outcome.named("restored")] == [3]
    assert same(job, undisturbed)


def test_a_single_copy_is_compared_with_nothing(tmp_path: Path) -> None:
    outcome, _ = run(tmp_path / "flipped", 2, 6, copies=1)
    assert (outcome.status, outcome.error) == ("finished", "")
    assert outcome.named("divergence") == []
