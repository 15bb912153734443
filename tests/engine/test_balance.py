"""Work moves from a slow worker to a fast one while the run runs: real processes, real time, the real controller."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import pytest
import torch
from tiny import SAMPLES, Tiny, difference
from torch import Tensor

from evenkeel.control.policy import Policy
from evenkeel.core.ids import WorkerId
from evenkeel.core.layout import Layout
from evenkeel.core.world import World
from evenkeel.data.dataset import TensorDataset
from evenkeel.engine.job import Job, Settings
from evenkeel.engine.local import LocalRun, Outcome
from evenkeel.engine.model import Model, model_shape
from evenkeel.models.registry import load_model
from evenkeel.plan.layout import Wish
from evenkeel.plan.samples import sample_indices

MICROS, SEQ, VOCAB = 10, 16, 24
SHORT, LONG = 100, 250
"""Of sequences of unequal length."""
WITHIN = 20
"""Steps in which a change of speed must have led to another layout."""
STEPS = 60
"""So many that a pause pays, however long it takes on a machine in use."""


@dataclass(frozen=True)
class Heavier(Tiny):
    """As a Tiny one, with passes that take milliseconds: long against what the system does between them."""

    dropout: float = 0.0
    blocks: int = 4
    seq: int = SEQ

    def __call__(self, worker: WorkerId) -> Job:
        job = super().__call__(worker)
        job.train, job.eval = TensorDataset(*_tokens(SAMPLES, SEQ)), None
        return job

    def model(self) -> Model:
        keys = {
            "vocab_size": VOCAB, "d_model": 48, "layers": self.blocks, "heads": 4, "kv_heads": 4, "d_ff": 96,
            "seq_len": self.seq, "dropout": self.dropout, "tie_embeddings": False,
        }  # fmt: skip
        return load_model("decoder", keys)


def _tokens(samples: int, length: int) -> tuple[Tensor, Tensor]:
    text = torch.randint(0, VOCAB, (samples, length + 1), generator=torch.Generator().manual_seed(3))
    return text[:, :-1].contiguous(), text[:, 1:].contiguous()


def job_of(folder: Path, steps: int, **settings: object) -> Heavier:
    folder.mkdir(exist_ok=True)
    return Heavier(folder, steps=steps, settings={"global_batch": 2 * MICROS, "eval_batches": 0, **settings})


def run(job: Heavier, data: int, pipeline: int, *, rebalance: bool = True) -> Outcome:
    workers = data * pipeline
    wish = Wish(data, pipeline, 1, workers, workers)
    policy = Policy(model_shape(job.model()), wish, MICROS, job.steps, rebalance=rebalance)
    outcome = LocalRun(job, policy).run()
    assert (outcome.status, outcome.error) == ("finished", "")
    return outcome


def slow(world: World) -> WorkerId:
    """Rank 1 of the first world is the one that is slowed."""
    return world.layout.members[1]


def share(layout: Layout, worker: WorkerId) -> int:
    return layout.pipelines[layout.places[worker].pipeline].share


def layers(layout: Layout, worker: WorkerId) -> int:
    shard = layout.shard(worker)
    return shard.stop - shard.start


def check_same(job: Heavier, outcome: Outcome, undisturbed: tuple[Outcome, dict[str, Tensor]]) -> None:
    """Every step's loss and the final model, in fp64: only the order of the sums is another."""
    assert len(outcome.losses) == STEPS
    assert outcome.losses == pytest.approx(undisturbed[0].losses, rel=1e-10)
    assert difference(job.final(), undisturbed[1]) < 1e-9


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Outcome, dict[str, Tensor]]:
    job = job_of(tmp_path_factory.mktemp("undisturbed"), STEPS)
    return run(job, 2, 1, rebalance=False), job.final()


def test_a_slow_worker_gets_fewer_micro_batches(tmp_path: Path, undisturbed: tuple[Outcome, dict[str, Tensor]]) -> None:
    job = job_of(tmp_path, STEPS, slowdown={1: 4.0})
    outcome = run(job, 2, 1)
    first, *later = outcome.worlds
    assert [p.share for p in first.layout.pipelines] == [MICROS // 2, MICROS // 2]
    assert later and later[0].base.step <= WITHIN
    assert later[0].cause == "rebalance"
    assert share(later[0].layout, slow(first)) in (1, 2, 3)
    told = outcome.named("rebalanced")[0].fields
    assert told["what"] == "shares" and told["predicted_gain_s"] > 0
    measured = outcome.named("rebalance_measured")[0].fields
    assert measured["predicted_gain_s"] == told["predicted_gain_s"]  # what it has won is for the benchmark to say
    assert measured["gain_s"] == pytest.approx(measured["step_s_before"] - measured["step_s_after"], abs=1e-5)
    check_same(job, outcome, undisturbed)


def test_layers_move_off_a_slow_worker(tmp_path: Path, undisturbed: tuple[Outcome, dict[str, Tensor]]) -> None:
    job = job_of(tmp_path, STEPS, slowdown={1: 4.0})
    outcome = run(job, 1, 2)
    first, *later = outcome.worlds
    assert later and later[0].base.step <= WITHIN
    assert layers(later[-1].layout, slow(first)) < layers(first.layout, slow(first))
    assert outcome.named("rebalanced")[0].fields["what"] == "cuts"
    check_same(job, outcome, undisturbed)


def test_slow_for_a_moment_is_ignored(tmp_path: Path, undisturbed: tuple[Outcome, dict[str, Tensor]]) -> None:
    job = job_of(tmp_path, STEPS, slowdown={1: 6.0}, slow_from=14, slow_to=16)
    outcome = run(job, 2, 1)
    assert len(outcome.worlds) == 1
    check_same(job, outcome, undisturbed)


def test_a_worker_that_becomes_slow_in_mid_run(tmp_path: Path, undisturbed: tuple[Outcome, dict[str, Tensor]]) -> None:
    begins = 9
    job = job_of(tmp_path, STEPS, slowdown={1: 4.0}, slow_from=begins)
    outcome = run(job, 2, 1)
    first, *later = outcome.worlds
    assert later and begins < later[0].base.step <= begins + WITHIN
    assert share(later[0].layout, slow(first)) in (1, 2, 3)
    check_same(job, outcome, undisturbed)


class Unequal:
    """Sequences of two lengths. As chance has it, the second half of every global batch has the longer ones."""

    def __init__(self, settings: Settings) -> None:
        self._samples = TensorDataset(*_tokens(settings.last_step * settings.global_batch, LONG))
        self._long: set[int] = set()
        for step, micro in product(range(1, settings.last_step + 1), range(MICROS // 2, MICROS)):
            indices = sample_indices(
                settings.seed, step, micro, micro_batch=2, global_batch=2 * MICROS, dataset_size=len(self)
            )
            self._long.update(indices)

    def __len__(self) -> int:
        return len(self._samples)

    def get(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        inputs, targets = self._samples.get(indices)
        length = LONG if self._long.issuperset(indices) else SHORT
        return inputs[:, :length], targets[:, :length]


@dataclass(frozen=True)
class TwoLengths(Heavier):
    seq: int = LONG

    def __call__(self, worker: WorkerId) -> Job:
        job = super().__call__(worker)
        job.train = Unequal(job.settings)
        return job


def test_longer_sequences_make_nobody_slow(tmp_path: Path) -> None:
    """One worker's passes take more than twice as long as those of the other, as long as their shares are equal."""
    job = TwoLengths(tmp_path, steps=24, settings={"global_batch": 2 * MICROS, "eval_batches": 0})
    outcome = run(job, 2, 1)
    assert [line.event for line in outcome.events if line.event == "rebalanced"] == []
    assert len(outcome.worlds) == 1


def test_micro_batches_of_unequal_shape_need_pipelines_of_one_stage(tmp_path: Path) -> None:
    job = TwoLengths(tmp_path, steps=4, settings={"global_batch": 2 * MICROS, "eval_batches": 0})
    outcome = LocalRun(job, Policy(model_shape(job.model()), Wish(1, 2, 1, 2, 2), MICROS, job.steps)).run()
    assert outcome.status == "failed"
    assert f"a micro-batch has shape (2, {LONG}), one of sample 0 has (2, {SHORT})" in outcome.error
