"""The executor against torch.distributed.pipelining: same losses, same gradients, and the order of the passes."""

import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from processes import run_processes
from torch import Tensor, nn

from evenkeel.engine.faults import Faults
from evenkeel.engine.model import Hidden
from evenkeel.engine.pipeline import Boundary, Executor
from evenkeel.engine.progress import AbortedError, Progress
from evenkeel.engine.slowdown import Slowdown
from evenkeel.plan.schedule import gpipe, one_f_one_b

WIDTH, ROWS = 6, 3


def _block(index: int) -> nn.Module:
    torch.manual_seed(index)
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH)).double()


def _batch(micros: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    inputs = torch.randn(micros, ROWS, WIDTH, dtype=torch.float64, generator=generator)
    return inputs, torch.randn(micros, ROWS, WIDTH, dtype=torch.float64, generator=generator)


def _loss(output: Tensor, target: Tensor) -> Tensor:
    return ((output - target) ** 2).sum()


class _Stage:
    def __init__(self, module: nn.Module, micros: int, last: bool) -> None:
        self.module, self.last = module, last
        self.inputs, self.targets = _batch(micros)

    def forward(self, micro: int, hidden: Tensor | None) -> Tensor:
        output: Tensor = self.module(self.inputs[micro] if hidden is None else hidden)
        return _loss(output, self.targets[micro]) if self.last else output


class _Links:
    def isend(self, tensor: Tensor, to: int) -> dist.Work:
        work = dist.isend(tensor, to)
        assert work is not None
        return work

    def irecv(self, tensor: Tensor, source: int) -> dist.Work:
        work = dist.irecv(tensor, source)
        assert work is not None
        return work


def _progress() -> Progress:
    progress = Progress()
    progress.begin(1, 1, lambda: True)
    return progress


def _executor(
    stage: int, stages: int, micros: int, schedule: str, slowdown: Slowdown | None = None
) -> tuple[nn.Module, Executor]:
    module = _block(stage)
    actions = {"1f1b": one_f_one_b, "gpipe": gpipe}[schedule](stage, stages, micros)
    boundary = Boundary(Hidden((ROWS, WIDTH), torch.float64), torch.device("cpu"))
    exit_ = boundary if stage < stages - 1 else None
    compute = _Stage(module, micros, stage == stages - 1)
    links = _Links() if stages > 1 else None
    return module, Executor(
        stage, stages, actions, compute, links, boundary, exit_, _progress(), Faults("w", (), bool),
        slowdown=slowdown,
    )  # fmt: skip


def _torch_1f1b(stage: int, stages: int, micros: int) -> list[Tensor]:
    from torch.distributed.pipelining import PipelineStage, Schedule1F1B

    module = _block(stage)
    inputs, targets = _batch(micros)
    pipe = PipelineStage(module, stage, stages, torch.device("cpu"))
    schedule = Schedule1F1B(pipe, micros, loss_fn=_loss, scale_grads=False)
    rows = micros * ROWS
    if stage == 0:
        schedule.step(inputs.view(rows, WIDTH))
    elif stage == stages - 1:
        schedule.step(target=targets.view(rows, WIDTH))
    else:
        schedule.step()
    return [p.grad for p in module.parameters() if p.grad is not None]


def _compare(rank: int, stages: int, micros: int, store: str) -> list[tuple[bool, float]]:
    warnings.simplefilter("ignore")
    dist.init_process_group("gloo", store=dist.FileStore(store, stages), rank=rank, world_size=stages)
    theirs = _torch_1f1b(rank, stages, micros)
    results = []
    for schedule in ("1f1b", "gpipe"):
        module, executor = _executor(rank, stages, micros, schedule)
        loss = executor.run()
        ours = [p.grad for p in module.parameters()]
        same = all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True) if a is not None)
        results.append((same, float(loss)))
        evaluated = executor.evaluate()
        assert float(evaluated) == results[-1][1]
    return results


@pytest.mark.parametrize(("stages", "micros"), [(2, 4), (3, 7), (3, 3)])
def test_same_gradients_as_torch_pipelining(stages: int, micros: int, tmp_path: Path) -> None:
    results = run_processes(_compare, stages, stages, micros, str(tmp_path / "store"))
    inputs, targets = _batch(micros)
    model = nn.Sequential(*(_block(i) for i in range(stages)))
    expected = sum(_loss(model(x), y).item() for x, y in zip(inputs, targets, strict=True))
    for rank, by_schedule in enumerate(results):
        for same, loss in by_schedule:
            assert same, f"stage {rank} has other gradients"
            assert loss == pytest.approx(expected if rank == stages - 1 else 0.0, rel=1e-12)


def test_one_stage_needs_no_communication() -> None:
    module, executor = _executor(0, 1, 3, "1f1b")
    inputs, targets = _batch(3)
    loss = executor.run()
    expected = torch.stack([_loss(module(x), y) for x, y in zip(inputs, targets, strict=True)]).sum()
    assert float(loss) == pytest.approx(expected.item(), rel=1e-12)
    gradients = torch.autograd.grad(expected, list(module.parameters()))
    for parameter, gradient in zip(module.parameters(), gradients, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)


def test_leaves_between_two_micro_batches_once_the_generation_is_aborted() -> None:
    _, executor = _executor(0, 1, 3, "1f1b")
    progress = executor._progress
    progress.begin(1, 1, lambda: progress.micro < 1)
    with pytest.raises(AbortedError):
        executor.run()
    assert (progress.phase, progress.micro) == ("forward", 1)


class _Noted(Slowdown):
    def __init__(self) -> None:
        super().__init__()
        self.ended: list[tuple[float, int]] = []

    def begin(self) -> float:
        return float(len(self.ended))

    def end(self, began: float, step: int) -> None:
        self.ended.append((began, step))


def test_each_pass_can_be_slowed() -> None:
    slowdown = _Noted()
    _, executor = _executor(0, 1, 3, "1f1b", slowdown)
    executor._progress.step = 7
    executor.run()
    assert slowdown.ended == [(float(n), 7) for n in range(6)]
    executor.evaluate()
    assert len(slowdown.ended) == 9


def test_a_first_stage_makes_torch_import_no_compiler() -> None:
    """Torch does for a gradient that it is handed; a new worker's first step took 1 to 2 s of everybody's time."""
    code = """
import sys, torch
from evenkeel.core.ids import WorkerId
from evenkeel.engine.faults import Faults
from evenkeel.engine.model import Hidden
from evenkeel.engine.pipeline import Boundary, Executor
from evenkeel.engine.progress import Progress
from evenkeel.plan.schedule import one_f_one_b
class Done:
    def wait(self): pass
class Links:
    def isend(self, tensor, to): return Done()
    def irecv(self, tensor, source):
        tensor.fill_(2.0)
        return Done()
class Stage:
    weight = torch.ones(3, requires_grad=True)
    def forward(self, micro, hidden): return self.weight * 5
progress = Progress()
progress.begin(1, 1, lambda: True)
edge = Boundary(Hidden((3,), torch.float32), torch.device("cpu"))
faults = Faults(WorkerId("w"), (), lambda _: False)
Executor(0, 2, one_f_one_b(0, 2, 4), Stage(), Links(), edge, edge, progress, faults).run()
assert Stage.weight.grad.tolist() == [40.0] * 3
assert not {"torch._dynamo", "sympy"} & sys.modules.keys()
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)
