"""Work moves from a slow worker to a fast one while the run runs: real processes, real time, the real controller."""

from dataclasses import dataclass
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
from evenkeel.engine.job import Job
from evenkeel.engine.local import LocalRun, Outcome
from evenkeel.engine.model import Model, model_shape
from evenkeel.models.registry import load_model
from evenkeel.plan.layout import Wish

MICROS, SEQ, VOCAB = 10, 16, 24
WITHIN = 20
"""Steps in which a change of speed must have led to another layout."""
STEPS = 60
"""So many that a pause pays, however long it takes on a machine in use."""


@dataclass(frozen=True)
class Heavier(Tiny):
    """As a Tiny one, with passes that take milliseconds: long against what the system does between them."""

    dropout: float = 0.0
    blocks: int = 4

    def __call__(self, worker: WorkerId) -> Job:
        job = super().__call__(worker)
        job.train, job.eval = TensorDataset(*_tokens()), None
        return job

    def model(self) -> Model:
        keys = {
            "vocab_size": VOCAB, "d_model": 48, "layers": self.blocks, "heads": 4, "kv_heads": 4, "d_ff": 96,
            "seq_len": SEQ, "dropout": self.dropout, "tie_embeddings": False,
        }  # fmt: skip
        return load_model("decoder", keys)


def _tokens() -> tuple[Tensor, Tensor]:
    text = torch.randint(0, VOCAB, (SAMPLES, SEQ + 1), generator=torch.Generator().manual_seed(3))
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


def check_same(outcome: Outcome, undisturbed: Outcome) -> None:
    assert outcome.losses == pytest.approx(undisturbed.losses, rel=1e-10)


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
    check_same(outcome, undisturbed[0])
    assert difference(job.final(), undisturbed[1]) < 1e-9


def test_layers_move_off_a_slow_worker(tmp_path: Path, undisturbed: tuple[Outcome, dict[str, Tensor]]) -> None:
    job = job_of(tmp_path, STEPS, slowdown={1: 4.0})
    outcome = run(job, 1, 2)
    first, *later = outcome.worlds
    assert later and later[0].base.step <= WITHIN
    assert layers(later[-1].layout, slow(first)) < layers(first.layout, slow(first))
    assert outcome.named("rebalanced")[0].fields["what"] == "cuts"
    check_same(outcome, undisturbed[0])


def test_slow_for_a_moment_is_ignored(tmp_path: Path, undisturbed: tuple[Outcome, dict[str, Tensor]]) -> None:
    job = job_of(tmp_path, STEPS, slowdown={1: 6.0}, slow_from=14, slow_to=16)
    outcome = run(job, 2, 1)
    assert len(outcome.worlds) == 1
    check_same(outcome, undisturbed[0])


def test_a_worker_that_becomes_slow_in_mid_run(tmp_path: Path) -> None:
    begins = 9
    job = job_of(tmp_path, STEPS, slowdown={1: 4.0}, slow_from=begins)
    outcome = run(job, 2, 1)
    first, *later = outcome.worlds
    assert later and begins < later[0].base.step <= begins + WITHIN
    assert share(later[0].layout, slow(first)) in (1, 2, 3)
