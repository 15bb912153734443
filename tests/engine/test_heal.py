"""A run with faults is the same run: real processes, real signals, the real controller."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import GATE, Tiny, difference
from torch import Tensor, nn

from evenkeel.control.messages import Event, Reported, WorkerReady
from evenkeel.control.policy import Policy
from evenkeel.core.model import ModelShape
from evenkeel.engine.faults import FaultPlan
from evenkeel.engine.local import LocalRun, Outcome
from evenkeel.engine.model import Model, model_shape
from evenkeel.plan.layout import Wish

STEPS = 8
NEVER = 10**9


class BadLayer(Tiny):
    """A job whose last block divides by zero."""

    def model(self) -> Model:
        model = super().model()
        layers = [replace(s, build=partial(_bad, s.build)) if s.name == "blocks.1" else s for s in model.layers]
        return replace(model, layers=tuple(layers))


def _bad(build: Callable[[], nn.Module]) -> nn.Module:
    layer = build()
    layer.register_forward_pre_hook(_divide)
    return layer


def _divide(_: nn.Module, inputs: tuple[Tensor]) -> None:
    if inputs[0].requires_grad:
        1 / 0  # noqa: B018


def policy(job: Tiny, workers: int, spares: int, **wish: Any) -> Policy:
    shape: ModelShape = model_shape(job.model())
    wishes = {"data": None, "pipeline": None, "tensor": None, "min_workers": 1} | wish
    return Policy(shape, Wish(max_workers=workers, **wishes), 4, job.steps, spares=spares)


def run(job: Tiny, workers: int, spares: int = 0, *, wish: dict[str, Any], **options: Any) -> tuple[Outcome, LocalRun]:
    local = LocalRun(job, policy(job, workers, spares, **wish), **options)
    return local.run(), local


def check_committed_once(outcome: Outcome, steps: int = STEPS) -> None:
    assert (outcome.status, outcome.error) == ("finished", "")
    assert [line.vote.step for line in outcome.metrics] == list(range(1, steps + 1))


def fault(phase: str, target: str = "rank:1", kind: str = "kill", step: int = 4, index: int = 0) -> FaultPlan:
    return FaultPlan(index, step, phase, target, kind)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Tiny, list[float | None], dict[str, Tensor]]:
    """Two pipelines of two stages in fp32, without any fault."""
    job = Tiny(tmp_path_factory.mktemp("undisturbed"), precision="fp32", steps=STEPS, tied=True)
    outcome, _ = run(job, 4, wish={"data": 2, "pipeline": 2})
    check_committed_once(outcome)
    return job, outcome.losses, job.final()


@pytest.mark.parametrize(
    ("phase", "target", "kind"),
    [
        ("forward", "rank:0", "kill"),
        ("backward", "rank:3", "segv"),
        ("reduce", "rank:1", "kill"),
        ("before_vote", "rank:2", "stop"),
        ("after_vote", "rank:0", "kill"),
        ("commit", "stage:1", "kill"),
        ("backward", "rank:2", "exception"),
        ("commit", "rank:3", "exception"),
    ],
)
def test_a_spare_takes_over_and_nothing_changes_to_the_last_bit(
    phase: str, target: str, kind: str, tmp_path: Path, undisturbed: tuple[Tiny, list[float | None], dict[str, Tensor]]
) -> None:
    job, losses, params = undisturbed
    job = replace(job, folder=tmp_path, faults=(fault(phase, target, kind),))
    outcome, local = run(job, 4, 1, wish={"data": 2, "pipeline": 2}, not_before={5: NEVER})
    check_committed_once(outcome)
    assert outcome.losses == losses
    assert all(torch.equal(job.final()[name], value) for name, value in params.items())
    first, last = outcome.worlds[0].layout, outcome.worlds[-1].layout
    survivors = [w for w in first.members if w in last.members]
    assert len(survivors) == (4 if kind == "exception" and phase != "commit" else 3)
    assert all(local.fleet.pid(w) == outcome.ready[w].pid for w in survivors)
    assert [last.places[w] for w in survivors] == [first.places[w] for w in survivors]
    [incident] = outcome.named("incident")
    assert incident.fields["attempts"] == 1


@pytest.mark.parametrize("phase", ["forward", "recovery"])
def test_the_spare_itself_is_lost(
    phase: str, tmp_path: Path, undisturbed: tuple[Tiny, list[float | None], dict[str, Tensor]]
) -> None:
    """Idle, or when it joins in a recovery; then the next spare takes the place."""
    job, losses, _ = undisturbed
    faults = (fault("backward", "rank:3", step=4), fault(phase, "spare", step=3, index=1))
    job = replace(job, folder=tmp_path, faults=faults)
    outcome, _ = run(job, 4, 2, wish={"data": 2, "pipeline": 2}, not_before={6: NEVER})
    check_committed_once(outcome)
    assert outcome.losses == losses
    lost = {line.fields["worker_id"] for line in outcome.named("worker_lost")}
    members = outcome.worlds[0].layout.members
    assert len(lost) == 2
    assert len(lost - set(members)) == 1
    assert members[3] in lost


@pytest.mark.parametrize("kind", ["kill", "exception"])
def test_a_fault_during_the_recovery_from_another(
    kind: str, tmp_path: Path, undisturbed: tuple[Tiny, list[float | None], dict[str, Tensor]]
) -> None:
    job, losses, params = undisturbed
    faults = (fault("after_vote", "rank:1"), fault("recovery", "rank:2", kind, index=1))
    job = replace(job, folder=tmp_path, faults=faults)
    outcome, _ = run(job, 4, 2, wish={"data": 2, "pipeline": 2}, not_before={6: NEVER})
    check_committed_once(outcome)
    assert outcome.losses == losses
    assert all(torch.equal(job.final()[name], value) for name, value in params.items())
    [incident] = outcome.named("incident")
    assert incident.fields["attempts"] == 2
    assert len(outcome.worlds) == 3


def check_against_plain_loop(job: Tiny, outcome: Outcome) -> None:
    losses, params = job.reference()
    check_committed_once(outcome, job.steps)
    assert outcome.losses == pytest.approx(losses, rel=1e-10)
    assert difference(job.final(), params) < 1e-10


@pytest.mark.parametrize(
    ("wish", "workers", "sizes"),
    [
        ({"data": 2, "pipeline": 2}, 4, [4, 3, 4]),
        ({"data": 3, "pipeline": 1}, 3, [3, 2, 3]),
        ({"data": 2, "pipeline": 1, "tensor": 2}, 4, [4, 2, 4]),
    ],
)
def test_without_a_spare_it_shrinks_and_grows_again_when_a_new_worker_comes(
    wish: dict[str, int], workers: int, sizes: list[int], tmp_path: Path
) -> None:
    def watch(_: LocalRun, event: Event) -> None:
        if isinstance(event, WorkerReady) and event.worker.worker_id == f"w{workers:04d}":
            job.open_gate()

    faults = (fault("backward", step=4), fault("forward", "rank:0", "exception", step=8, index=GATE))
    job = Tiny(tmp_path, steps=14, tied=True, blocks=3, faults=faults)
    outcome, local = run(job, workers, wish=wish, not_before={workers: 6}, watch=watch)
    check_against_plain_loop(job, outcome)
    assert [world.size for world in outcome.worlds] == sizes
    lost = {line.fields["worker_id"] for line in outcome.named("worker_lost")}
    assert lost == {outcome.worlds[0].layout.members[1]}
    for world in outcome.worlds:
        assert all(info.pid == local.fleet.pid(info.worker_id) for info in world.members)
    assert len({line.vote.generation for line in outcome.metrics}) == len(sizes)


def test_an_exception_that_comes_again_ends_the_run_and_says_where(tmp_path: Path) -> None:
    job = Tiny(tmp_path, faults=tuple(fault("forward", "rank:1", "exception", 3, index) for index in range(2)))
    outcome, _ = run(job, 2, wish={"data": 1, "pipeline": 2})
    assert outcome.status == "failed"
    assert [line.vote.step for line in outcome.metrics] == [1, 2]
    assert "failed again after a retry" in outcome.error
    assert f"worker {outcome.worlds[0].layout.members[1]}, step 3, forward" in outcome.error
    assert "InjectedError" in outcome.error


def test_the_layer_that_raised_is_named(tmp_path: Path) -> None:
    job = BadLayer(tmp_path)
    outcome, _ = run(job, 2, wish={"data": 1, "pipeline": 2})
    assert outcome.status == "failed"
    assert "step 1, forward, layer blocks.1, micro-batch 0: ZeroDivisionError" in outcome.error


def test_what_is_lost_with_its_only_holder_is_named(tmp_path: Path) -> None:
    job = Tiny(tmp_path, faults=(fault("backward", "rank:1", step=3),))
    outcome, _ = run(job, 2, 1, wish={"data": 1, "pipeline": 2})
    assert outcome.status == "failed"
    assert "step 2 is lost: nobody alive holds" in outcome.error
    assert "param/blocks.1." in outcome.error


def test_a_stop_is_carried_by_a_vote(tmp_path: Path) -> None:
    def stop(local: LocalRun, event: Event) -> None:
        if isinstance(event, Reported) and event.reports[-1].vote.step == 2:
            local.stop("enough")

    job = Tiny(tmp_path, steps=10**6)
    outcome, _ = run(job, 2, wish={"data": 2, "pipeline": 1}, watch=stop)
    assert (outcome.status, outcome.error) == ("stopped", "enough")
    steps = [line.vote.step for line in outcome.metrics]
    assert steps == list(range(1, len(steps) + 1))
    assert outcome.metrics[-1].vote.flags


def test_validation_is_the_same_in_every_layout(tmp_path: Path) -> None:
    found = []
    for wish, workers in (({"data": 1, "pipeline": 1}, 1), ({"data": 2, "pipeline": 2}, 4)):
        job = Tiny(tmp_path, steps=4, settings={"eval_every": 2})
        outcome, _ = run(job, workers, wish=wish)
        check_committed_once(outcome, 4)
        found.append([(line.fields["version"], line.fields["loss"]) for line in outcome.named("validation")])
    assert [version for version, _ in found[0]] == [0, 2, 4]
    assert [loss for _, loss in found[1]] == pytest.approx([loss for _, loss in found[0]], rel=1e-12)
    assert len({loss for _, loss in found[0]}) == 3
