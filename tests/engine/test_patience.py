"""Who is waited for and who is not, and what ends a run whose own code is at fault, with real processes."""

import os
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import pytest
from test_heal import NEVER, check_committed_once, fault, run
from tiny import SAMPLES, Tiny
from torch import Tensor, nn

from evenkeel.control import liveness
from evenkeel.control import messages as m
from evenkeel.core.ids import WorkerId
from evenkeel.data.dataset import TensorDataset
from evenkeel.engine.job import FinalTensors, Job
from evenkeel.engine.local import LocalRun
from evenkeel.engine.model import Model
from evenkeel.plan.samples import sample_indices

STEPS = 6
STALL_S = 3.5
"""Longer than two silences, so that the controller finds twice that nothing has moved."""


@dataclass(frozen=True)
class Slow(Tiny):
    """Reading a sample stalls once on the first worker, and so does writing the final model."""

    def __call__(self, worker: WorkerId) -> Job:
        job = super().__call__(worker)
        if worker.endswith("0"):
            job.train = Stalling(job.train)  # type: ignore[arg-type]
        return job

    def write_final(self, final: FinalTensors) -> None:
        time.sleep(STALL_S)
        super().write_final(final)


class Stalling:
    """Stalls in the twelfth read: in the third step of a worker that reads four micro-batches a step."""

    def __init__(self, data: TensorDataset) -> None:
        self._data, self._reads = data, 0

    def __len__(self) -> int:
        return len(self._data)

    def get(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        self._reads += 1
        if self._reads == 12:
            time.sleep(STALL_S)
        return self._data.get(indices)


@pytest.mark.parametrize(("workers", "wish"), [(1, {"data": 1, "pipeline": 1}), (2, {"data": 1, "pipeline": 2})])
def test_who_answers_is_not_killed_for_slow_reads_and_writes(
    workers: int, wish: dict[str, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody waits for the only worker, and nobody else has what the first stage has."""
    monkeypatch.setattr(liveness, "STUCK_S", 0.5)
    monkeypatch.setattr(liveness, "STUCK_STEPS", 0)
    job = Slow(tmp_path, steps=STEPS)
    outcome, _ = run(job, workers, wish=wish)
    check_committed_once(outcome, STEPS)
    assert outcome.named("worker_lost") == []
    assert len(outcome.worlds) == 1


def test_one_that_is_stopped_while_the_others_park_is_found_by_a_probe(tmp_path: Path) -> None:
    faults = (fault("backward", "rank:1", "kill"), fault("forward", "rank:2", "stop", index=1))
    job = Tiny(tmp_path, steps=STEPS, faults=faults)
    outcome, _ = run(job, 3, wish={"data": 3, "pipeline": 1}, not_before={3: NEVER})
    check_committed_once(outcome, STEPS)
    causes = {line.fields["worker_id"]: line.fields["cause"] for line in outcome.named("worker_lost")}
    members = outcome.worlds[0].layout.members
    assert causes == {members[1]: "killed by SIGKILL", members[2]: "no answer to a probe"}


@dataclass(frozen=True)
class Exits(Tiny):
    """A job whose last block ends the thread that runs it."""

    def model(self) -> Model:
        model = super().model()
        layers = [replace(s, build=partial(_exiting, s.build)) if s.name == "blocks.1" else s for s in model.layers]
        return replace(model, layers=tuple(layers))


def _exiting(build: partial[nn.Module]) -> nn.Module:
    layer = build()
    layer.register_forward_pre_hook(_exit)
    return layer


def _exit(_: nn.Module, inputs: tuple[Tensor]) -> None:
    if inputs[0].requires_grad:
        sys.exit("enough")


def test_an_exit_in_training_code_is_like_any_exception(tmp_path: Path) -> None:
    outcome, _ = run(Exits(tmp_path, steps=STEPS), 2, wish={"data": 2, "pipeline": 1})
    assert outcome.status == "failed"
    assert "failed again after a retry: worker " in outcome.error
    assert "step 1, forward, layer blocks.1, micro-batch 0: SystemExit: enough" in outcome.error
    assert outcome.named("worker_lost") == []
    assert len(outcome.worlds) == 2


@dataclass(frozen=True)
class Poisoned(Tiny):
    """Whoever reads the first sample of step 3 dies, once the spare is there."""

    def __call__(self, worker: WorkerId) -> Job:
        job = super().__call__(worker)
        order = sample_indices(7, 3, 0, micro_batch=2, global_batch=8, dataset_size=SAMPLES)
        job.train = Deadly(job.train, tuple(order), self.folder / "open")  # type: ignore[arg-type]
        return job


class Deadly:
    def __init__(self, data: TensorDataset, batch: tuple[int, ...], gate: Path) -> None:
        self._data, self._batch, self._gate = data, batch, gate

    def __len__(self) -> int:
        return len(self._data)

    def get(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        if tuple(indices) == self._batch:
            while not self._gate.exists():
                time.sleep(0.01)
            os.kill(os.getpid(), signal.SIGKILL)
        return self._data.get(indices)


def test_a_batch_that_kills_everybody_is_named_before_what_is_lost(tmp_path: Path) -> None:
    def watch(local: LocalRun, _: m.Event) -> None:
        if len(local.outcome.ready) == 3:
            job.open_gate()

    job = Poisoned(tmp_path, steps=STEPS)
    outcome, _ = run(job, 2, 1, wish={"data": 2, "pipeline": 1}, not_before={3: NEVER}, watch=watch)
    assert outcome.status == "failed"
    assert outcome.error.startswith("step 3 took workers down 3 times: ")
    assert outcome.error.count("(killed by SIGKILL)") == 3
    assert [line.vote.step for line in outcome.metrics] == [1, 2]
