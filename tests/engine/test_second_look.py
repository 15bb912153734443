"""What one worker, or one answer of the store, says of a checkpoint is not believed before the controller has looked.

Real processes and files; who "has no mount" is given another folder, where nothing is.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from lives import Life, finished, prepared_in

from evenkeel.control import messages as m
from evenkeel.control.controller import Controller
from evenkeel.control.entries import Shown
from evenkeel.core.ids import Version, WorkerId
from evenkeel.engine.fleet import Fleet
from evenkeel.engine.job import Job
from evenkeel.engine.local import Outcome
from evenkeel.runtime import saving
from evenkeel.runtime.job import JobMaker
from evenkeel.runtime.prepare import Prepared

STEPS, FIRST = 9, 5
"""Of the whole run, and of its first life: with a checkpoint every second step and one of the last, 4 and 5 stay."""
NEWEST = Version(5, 1)


@dataclass(frozen=True)
class Unmounted:
    """Makes the jobs of workers, those of some of which look for the run where it is not."""

    maker: JobMaker
    without: Sequence[str]
    elsewhere: str

    def __call__(self, worker_id: WorkerId) -> Job:
        there = any(worker_id.startswith(name) for name in self.without)
        return (replace(self.maker, folder=self.elsewhere) if there else self.maker)(worker_id)


class Next(Life):
    """The run is submitted again, and some of its workers have no mount."""

    def __init__(self, prepared: Prepared, before: Sequence[Outcome], without: Sequence[str], elsewhere: Path) -> None:
        super().__init__(prepared)
        lines = [line.vote for outcome in before for line in outcome.metrics]
        entries = [entry for outcome in before for entry in outcome.journal]
        number = 1 + len(before)
        self._controller = Controller(prepared.spec.policy, number, entries, Shown.of(reversed(lines)), again=True)
        self.fleet = Fleet(Unmounted(prepared.maker, without, str(elsewhere)), prefix=f"life{number}-")


def gone_back(outcome: Outcome) -> list[Version]:
    return [entry.base for entry in outcome.journal if isinstance(entry, m.Restored)]


def test_one_without_a_mount_is_replaced_and_the_run_goes_on_from_the_same_checkpoint(tmp_path: Path) -> None:
    truth = finished(Life(prepared_in(tmp_path, "truth", STEPS))).losses
    prepared = prepared_in(tmp_path, "run", STEPS)
    before = finished(Life(prepared, last_step=FIRST))
    outcome = finished(Next(prepared, [before], ["life2-0001"], tmp_path / "elsewhere"))
    assert gone_back(outcome) == []
    assert [(world.base, world.saved) for world in outcome.worlds] == [(NEWEST, True), (NEWEST, True)]
    assert outcome.losses == truth[FIRST:]
    gone = f"{tmp_path}/elsewhere/checkpoints/step-00000005: the checkpoint of step 5, generation 1, is gone"
    [unreadable] = outcome.named("checkpoint_unreadable")
    assert (unreadable.fields["worker_id"], unreadable.fields["error"]) == ("life2-0001", gone)
    [lost] = outcome.named("worker_lost")
    assert lost.fields["worker_id"] == "life2-0001"
    assert lost.fields["cause"] == f"cannot read the checkpoint of step 5, which is whole: {gone}"
    assert outcome.named("checkpoint_damaged") == []


def test_where_no_worker_has_a_mount_the_run_ends_and_goes_on_from_the_newest_when_they_have(tmp_path: Path) -> None:
    truth = finished(Life(prepared_in(tmp_path, "truth", STEPS))).losses
    prepared = prepared_in(tmp_path, "run", STEPS)
    before = finished(Life(prepared, last_step=FIRST))
    failed = Next(prepared, [before], ["life2-"], tmp_path / "elsewhere").run()
    gone = f"{tmp_path}/elsewhere/checkpoints/step-00000005: the checkpoint of step 5, generation 1, is gone"
    assert failed.status == "failed"
    assert failed.error.startswith("3 worlds could not begin: life2-")
    assert f" on node local cannot read the checkpoint of step 5, which is whole: {gone}; see to " in failed.error
    assert failed.error.endswith("then the same command goes on from there")
    assert gone_back(failed) == [] and failed.losses == []
    again = finished(Next(prepared, [before, failed], [], tmp_path / "elsewhere"))
    assert gone_back(again) == []
    assert [world.base for world in again.worlds] == [NEWEST]
    assert again.losses == truth[FIRST:]


class Unanswered(Life):
    """The answer to the writing of the first manifest is lost; then everybody dies."""

    def _carry_out(self, command: m.Command) -> None:
        if isinstance(command, m.CommitCheckpoint) and not self.outcome.named("checkpoint_failed"):
            done = saving.complete(self._prepared.directory, self._prepared.spec, command)
            assert isinstance(done, m.CheckpointCommitted)
            self.fleet.events.put(m.CheckpointFailed(command.version, "503 slow down"))
            for worker in self.outcome.worlds[-1].layout.members:
                self.fleet.signal(worker)
        else:
            super()._carry_out(command)


def test_a_manifest_that_arrived_is_found_before_the_run_goes_back(tmp_path: Path) -> None:
    truth = finished(Life(prepared_in(tmp_path, "truth", STEPS))).losses
    outcome = finished(Unanswered(prepared_in(tmp_path, "run", STEPS)))
    [failed] = outcome.named("checkpoint_failed")
    [found] = outcome.named("checkpoint_found")
    assert failed.fields["checkpoint"] == found.fields["checkpoint"] == 2
    assert gone_back(outcome) in ([], [Version(2, 1)])  # whether anybody came to another step before all were dead
    assert [(world.base, world.saved) for world in outcome.worlds[1:]] == [(Version(2, 1), True)]
    steps = {line.vote.step: line.vote.loss for line in outcome.metrics}
    assert [steps[step] for step in range(1, STEPS + 1)] == truth
