"""Owners publish new parameters while the next forward pass runs: each layer waits for its own ones, and no other."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import count
from pathlib import Path

import torch
from tiny import GATE, Tiny, difference, layout_of, wait_for_file
from torch import Tensor, nn

from evenkeel.control.messages import Event, WorkerLost
from evenkeel.control.policy import Policy
from evenkeel.core.ids import WorkerId
from evenkeel.engine.collective import Pending, Share
from evenkeel.engine.faults import FaultPlan
from evenkeel.engine.job import Job
from evenkeel.engine.local import LocalRun, Outcome, run_static
from evenkeel.engine.model import Model, model_shape
from evenkeel.engine.tcp import TcpGroup
from evenkeel.plan.layout import Wish

GATHER = TcpGroup.gather_shares
STEPS, HELD = 8, 4
"""Steps of a run, and the one in whose commit a worker is held: it publishes nothing before that is over."""
BEHIND = "rank:1"
"""Who is held, in two pipelines of which the first has two stages: alone the holder of what the whole one has twice."""
CUTS, SHARES = [[0, 2, 4], [0, 4]], [2, 2]
WHOLE = WorkerId("w0002")
"""The worker of the second pipeline; each of the others holds half of what it holds."""


@dataclass(frozen=True)
class Held(Tiny):
    """Whoever comes to its gate, and goes on from there, is noted. A fault waits for the spare."""

    def fault_once(self, index: int) -> bool:
        if index < GATE:
            wait_for_file(self.folder / "spare")
            return super().fault_once(index)
        self.note("held")
        fires = super().fault_once(index)
        self.note("released")
        return fires

    def note(self, name: str, text: str = "") -> None:
        (self.folder / name).write_text(text)

    def noted(self, name: str) -> bool:
        return (self.folder / name).exists()


@dataclass(frozen=True)
class Watched(Held):
    """In WHOLE, in the step after HELD, two layers note what is there when they begin, and the gate opens then."""

    def __call__(self, worker: WorkerId) -> Job:
        job = super().__call__(worker)
        return replace(job, model=self._watched(job.model)) if worker == WHOLE else job

    def _watched(self, model: Model) -> Model:
        def begins(layer: int) -> None:
            self.note(f"layer{layer}", " ".join(name for name in ("open", "released") if self.noted(name)))
            self.open_gate()

        layers = [
            replace(spec, build=partial(_in_step_after_held, spec.build, partial(begins, i))) if i in (0, 2) else spec
            for i, spec in enumerate(model.layers)
        ]
        return replace(model, layers=tuple(layers))


def _in_step_after_held(build: Callable[[], nn.Module], begins: Callable[[], None]) -> nn.Module:
    layer, passes = build(), count()

    def before(*_: object) -> None:
        if torch.is_grad_enabled() and next(passes) == HELD * SHARES[1]:
            begins()

    layer.register_forward_pre_hook(before)
    return layer


@dataclass(frozen=True)
class Staged(Tiny):
    """What is published comes over a copy, as from host memory to a GPU that several workers share."""

    def __call__(self, worker: WorkerId) -> Job:
        TcpGroup.gather_shares = _staged  # type: ignore[method-assign]
        return super().__call__(worker)


class _Copied:
    def __init__(self, work: Pending, source: Tensor, target: Tensor) -> None:
        self._work, self._source, self._target = work, source, target

    def wait(self) -> None:
        self._work.wait()
        self._target.copy_(self._source)

    def done(self) -> bool:
        return self._work.done()


def _staged(group: TcpGroup, tensor: Tensor, shares: Sequence[Share], async_op: bool = False) -> Pending:
    copy = tensor.clone()
    return _Copied(GATHER(group, copy, shares, async_op), copy, tensor)


def trained(job: Tiny, copies: int | None) -> dict[str, Tensor]:
    run_static(job, 3, partial(layout_of, cuts=CUTS, tensor=1, shares=SHARES), STEPS, copies=copies)
    return job.final()


def test_a_layer_begins_while_what_later_ones_need_is_still_published(tmp_path: Path) -> None:
    """Whoever waited for everything would wait for ever: the gate opens only when the first layer begins."""
    faults = (FaultPlan(GATE, HELD, "commit", BEHIND, "exception"),)
    (tmp_path / "all").mkdir()
    expected = trained(Tiny(tmp_path / "all", steps=STEPS), None)
    found = trained(Watched(tmp_path, steps=STEPS, faults=faults), 1)
    assert (tmp_path / "held").exists()
    assert (tmp_path / "layer0").read_text() == ""
    assert (tmp_path / "layer2").read_text() == "open released"
    assert difference(found, expected) < 1e-12


def test_autograd_takes_no_notice_of_what_is_published(tmp_path: Path) -> None:
    """Parameters of later layers arrive while those of earlier ones are kept for their backward pass."""
    (tmp_path / "all").mkdir()
    expected = trained(Tiny(tmp_path / "all", steps=STEPS), None)
    assert difference(trained(Staged(tmp_path, steps=STEPS), 1), expected) < 1e-12


def run(job: Tiny, watch: Callable[[LocalRun, Event], None] | None = None) -> tuple[Outcome, LocalRun]:
    """Three pipelines of one stage and a spare; each part of the state has two owners."""
    wish = Wish(data=3, pipeline=1, tensor=1, min_workers=1, max_workers=3)
    policy = Policy(model_shape(job.model()), wish, 4, STEPS, 1, copies=2)
    local = LocalRun(job, policy, watch=watch)
    return local.run(), local


def test_a_death_while_parameters_are_published_is_healed(tmp_path: Path) -> None:
    """Rank 1 dies in the forward pass of a step for which rank 2 has published nothing yet: it is held until then."""
    undisturbed = Held(tmp_path / "undisturbed", precision="fp32", steps=STEPS, tied=True)
    undisturbed.folder.mkdir()
    expected, _ = run(undisturbed)
    faults = (
        FaultPlan(GATE, HELD, "commit", "rank:2", "exception"),
        FaultPlan(0, HELD + 1, "forward", "rank:1", "kill"),
    )
    job = replace(undisturbed, folder=tmp_path, faults=faults)

    def watch(local: LocalRun, event: Event) -> None:
        if len(local.outcome.ready) == 4:
            job.note("spare")
        if isinstance(event, WorkerLost):
            job.open_gate()

    outcome, local = run(job, watch)
    assert job.noted("held")
    assert (outcome.status, outcome.error) == ("finished", "")
    first, last = outcome.worlds[0].layout, outcome.worlds[-1].layout
    assert [line.fields["worker_id"] for line in outcome.named("worker_lost")] == [first.members[1]]
    survivors = [w for w in first.members if w != first.members[1]]
    assert all(local.fleet.pid(w) == outcome.ready[w].pid and w in last.members for w in survivors)
    [incident] = outcome.named("incident")
    assert incident.fields["attempts"] == 1
    assert outcome.losses == expected.losses
    assert [line.vote.step for line in outcome.metrics] == list(range(1, STEPS + 1))
    assert all(torch.equal(job.final()[name], value) for name, value in undisturbed.final().items())
