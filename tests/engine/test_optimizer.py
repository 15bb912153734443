"""AdamW over flat buffers against torch.optim.AdamW on the tensors one by one; the learning rate as a function."""

import pytest
import torch

from evenkeel.core.model import Shard
from evenkeel.engine.model import model_shape
from evenkeel.engine.optimizer import AdamW, gradient_scale
from evenkeel.engine.state import ShardState
from evenkeel.models.registry import load_model
from evenkeel.plan.learning_rate import FLOOR, learning_rate

CONFIG = {"vocab_size": 40, "d_model": 24, "layers": 2, "heads": 4, "kv_heads": 2, "d_ff": 40, "seq_len": 16}
TOKENS = 96


def shard_state(precision: str, shard: Shard | None = None) -> ShardState:
    model = load_model("decoder", CONFIG)
    shape = model_shape(model)
    state = ShardState(model, shape, shard or Shard(0, shape.depth, 0, 1), precision)
    state.initialise(1)
    return state


def fill_grads(state: ShardState, step: int) -> None:
    for i, name in enumerate(state.boxes):
        generator = torch.Generator().manual_seed(1000 * step + i)
        grad = state.grad(name)
        grad.copy_(torch.randn(grad.shape, generator=generator) * TOKENS)


@pytest.mark.parametrize(("precision", "fused"), [("fp32", True), ("fp64", True), ("fp64", False)])
def test_equals_torch(precision: str, fused: bool) -> None:
    state = shard_state(precision)
    params = {name: torch.nn.Parameter(state.tensor(f"param/{name}").clone()) for name in state.boxes}
    options = {"lr": 0.0, "betas": (0.9, 0.95), "eps": 1e-8, "fused": fused}
    decayed = [p for p in params.values() if p.ndim >= 2]
    plain = [p for p in params.values() if p.ndim < 2]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}]
    theirs = torch.optim.AdamW(groups, **options)
    ours = AdamW(state, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    for step in range(1, 6):
        lr = learning_rate(step, peak=1e-2, warmup=2, last=5, schedule="cosine")
        fill_grads(state, step)
        for name, p in params.items():
            p.grad = state.grad(name).clone().div_(TOKENS)
        for group in theirs.param_groups:
            group["lr"] = lr
        theirs.step()
        ours.step(step, lr, TOKENS)
    for name, p in params.items():
        expected = {"param": p, "exp_avg": theirs.state[p]["exp_avg"], "exp_avg_sq": theirs.state[p]["exp_avg_sq"]}
        for kind, tensor in expected.items():
            mine = state.tensor(f"{kind}/{name}")
            if precision == "fp32":
                assert torch.equal(mine, tensor.detach())
            else:
                torch.testing.assert_close(mine, tensor.detach(), rtol=1e-12, atol=1e-16)


def test_gaps_stay_zero_and_holders_of_a_slice_stay_equal_bit_for_bit() -> None:
    whole, part = shard_state("fp32"), shard_state("fp32", Shard(1, 3, 0, 1))
    for state in (whole, part):
        optimizer = AdamW(state)
        for step in range(1, 4):
            state.zero_grad()
            for name in state.boxes:
                generator = torch.Generator().manual_seed(sum(name.encode()) + step)
                state.grad(name).copy_(torch.randn(state.grad(name).shape, generator=generator))
            optimizer.step(step, 1e-3, 3.0)
    for name in part.boxes:
        for kind in ("param", "exp_avg", "exp_avg_sq"):
            assert torch.equal(part.tensor(f"{kind}/{name}"), whole.tensor(f"{kind}/{name}"))
    held = sum(box.size for box in whole.boxes.values())
    for flat in (whole.params, whole.exp_avg, whole.exp_avg_sq):
        assert int(flat.count_nonzero()) <= held < flat.numel()


def test_bf16_modules_follow_the_float32_parameters() -> None:
    state = shard_state("bf16")
    before = state.params.clone()
    fill_grads(state, 1)
    AdamW(state).step(1, 1e-2, TOKENS)
    assert not torch.equal(before, state.params)
    for name, parameter in state.stage.named():
        assert torch.equal(parameter, state.tensor(f"param/{name}").bfloat16())


def test_learning_rate() -> None:
    def rate(step: int, schedule: str) -> float:
        return learning_rate(step, peak=2.0, warmup=4, last=104, schedule=schedule)

    for schedule in ("cosine", "linear", "constant"):
        assert [rate(step, schedule) for step in (1, 2, 4)] == [0.5, 1.0, 2.0]
    assert rate(54, "cosine") == rate(54, "linear") == pytest.approx(2 * (FLOOR + (1 - FLOOR) / 2))
    assert rate(104, "cosine") == rate(104, "linear") == pytest.approx(2 * FLOOR)
    assert rate(104, "constant") == 2.0
    assert learning_rate(1, peak=2.0, warmup=0, last=1, schedule="cosine") == pytest.approx(2 * FLOOR)
    with pytest.raises(ValueError, match=r"train\.schedule"):
        rate(5, "step")


def test_gradients_are_divided_by_tokens_and_clipped_by_norm() -> None:
    assert gradient_scale(100, 0.5, 1.0) == gradient_scale(100, 5.0, 0.0) == 100.0
    assert gradient_scale(100, 4.0, 2.0) == 200.0
