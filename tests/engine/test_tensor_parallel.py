"""Layers cut over 2 and 4 ranks against the same model whole, in float64, with dropout."""

from collections.abc import Mapping

import pytest
import torch
from tensor_group import ThreadGroup, on_ranks
from torch import Tensor, nn

from evenkeel.core.boxes import cut
from evenkeel.core.model import Shard
from evenkeel.engine.loss import cross_entropy
from evenkeel.engine.model import LayerSpec, Model, loss_group, model_shape, whole_model
from evenkeel.engine.parallel import set_group
from evenkeel.engine.random import KeyedDropout, RandomKey, bind_random
from evenkeel.engine.state import ShardState
from evenkeel.models.registry import load_model

SMALL = {"vocab_size": 48, "d_model": 32, "layers": 2, "heads": 4, "kv_heads": 4, "d_ff": 64, "seq_len": 16}


def decoder(**keys: object) -> Model:
    return load_model("decoder", {**SMALL, "dropout": 0.2, **keys})


def batch(seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    inputs, targets = torch.randint(0, 48, (2, 3, 16), generator=generator)
    targets[0, :5] = -100
    return inputs, targets


def whole(model: Model, inputs: Tensor, targets: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    stage = whole_model(model, seed=5, dtype=torch.float64)
    key = RandomKey(9)
    key.at(3, 1)
    bind_random(stage, key)
    loss, _ = model.loss(stage(inputs), targets, None)
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in stage.named() if p.grad is not None}


def parted(model: Model, inputs: Tensor, targets: Tensor, group: ThreadGroup) -> tuple[Tensor, Mapping[str, Tensor]]:
    shape = model_shape(model)
    state = ShardState(model, shape, Shard(0, shape.depth, group.rank, group.size), "fp64")
    state.initialise(seed=5)
    state.set_group(group)
    key = RandomKey(9)
    key.at(3, 1)
    bind_random(state.stage, key)
    loss, _ = model.loss(state.stage(inputs), targets, loss_group(model, group))
    loss.backward()
    return loss.detach(), {name: state.grad(name) for name in state.boxes}


@pytest.mark.parametrize("parts", [2, 4])
@pytest.mark.parametrize("tie_embeddings", [False, True])
def test_decoder_is_the_same_cut_or_whole(parts: int, tie_embeddings: bool) -> None:
    model = decoder(tie_embeddings=tie_embeddings)
    inputs, targets = batch()
    expected_loss, expected = whole(model, inputs, targets)
    shape = model_shape(model)
    ranks = on_ranks(parts, lambda group: parted(model, inputs, targets, group))
    for rank, (loss, grads) in enumerate(ranks):
        torch.testing.assert_close(loss, expected_loss, rtol=1e-12, atol=0)
        assert grads.keys() == expected.keys()
        for name, grad in grads.items():
            param = shape.param(name)
            box = cut(param.shape, param.split, rank, parts)
            torch.testing.assert_close(grad, expected[name][box.slices], rtol=1e-10, atol=1e-13)


def test_grouped_queries_are_cut_by_their_key_value_head() -> None:
    model = decoder(heads=8, kv_heads=2)
    inputs, targets = batch()
    expected_loss, expected = whole(model, inputs, targets)
    (loss, grads), _ = on_ranks(2, lambda group: parted(model, inputs, targets, group))
    torch.testing.assert_close(loss, expected_loss, rtol=1e-12, atol=0)
    name = "blocks.0.attention.key.weight"
    torch.testing.assert_close(grads[name], expected[name][:4], rtol=1e-10, atol=1e-13)


def test_replicated_parameters_get_the_same_bits_on_each_rank() -> None:
    model = decoder()
    inputs, targets = batch()
    (_, first), (_, second) = on_ranks(2, lambda group: parted(model, inputs, targets, group))
    for name in ("blocks.0.attention_norm.weight", "blocks.1.feed_forward_norm.weight", "head.norm.weight"):
        assert torch.equal(first[name], second[name])


def test_one_all_reduce_per_part_of_a_block_and_direction() -> None:
    model = decoder(dropout=0.0)
    inputs, targets = batch()

    def count(group: ThreadGroup) -> int:
        parted(model, inputs, targets, group)
        return group.calls

    # Per block: attention and feed-forward, forward and backward; then embedding, loss, and the head's input gradient.
    assert on_ranks(2, count) == [2 * 4 + 3] * 2


def test_validation_without_gradients_is_the_same_too() -> None:
    model = decoder()
    inputs, targets = batch()
    stage = whole_model(model, seed=5, dtype=torch.float64).eval()
    with torch.no_grad():
        expected, _ = model.loss(stage(inputs), targets, None)

    def evaluate(group: ThreadGroup) -> Tensor:
        shape = model_shape(model)
        state = ShardState(model, shape, Shard(0, shape.depth, group.rank, group.size), "fp64")
        state.initialise(seed=5)
        state.set_group(group)
        state.stage.eval()
        with torch.no_grad():
            return model.loss(state.stage(inputs), targets, group)[0]

    for loss in on_ranks(2, evaluate):
        torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)


def test_one_part_is_the_plain_module() -> None:
    model = decoder()
    shape = model_shape(model)
    state = ShardState(model, shape, Shard(0, shape.depth, 0, 1))
    kinds = {type(module) for module in state.stage.modules()}
    assert nn.Linear in kinds and nn.Embedding in kinds
    assert not any("Column" in kind.__name__ or "Vocab" in kind.__name__ for kind in kinds)


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(6, 8)
        self.drop = KeyedDropout(0.3)
        self.down = nn.Linear(8, 6)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.drop(torch.tanh(self.up(x))))


def user_model(plan: Mapping[str, str]) -> Model:
    layers = (
        LayerSpec("in", lambda: nn.Linear(4, 6)),
        LayerSpec("mlp", Mlp),
        LayerSpec("out", lambda: nn.Linear(6, 4)),
    )
    return Model(layers, tp_plan=plan)


@pytest.mark.parametrize("gathered", ["colwise_gather_output", "colwise_rep"])
def test_biases_gathered_outputs_and_layers_that_are_linear_themselves(gathered: str) -> None:
    model = user_model(
        {"in": gathered, "mlp.up": "colwise", "mlp.drop": "colwise", "mlp.down": "rowwise", "out": gathered}
    )
    inputs = torch.randn(5, 4, dtype=torch.float64)
    targets = torch.tensor([0, 1, 2, 3, 0])
    expected_loss, expected = whole(model, inputs, targets)
    shape = model_shape(model)
    assert shape.tensor_divides == 2
    for rank, (loss, grads) in enumerate(on_ranks(2, lambda group: parted(model, inputs, targets, group))):
        torch.testing.assert_close(loss, expected_loss, rtol=1e-12, atol=0)
        for name, grad in grads.items():
            param = shape.param(name)
            box = cut(param.shape, param.split, rank, 2)
            torch.testing.assert_close(grad, expected[name][box.slices], rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize(
    ("plan", "words"),
    [
        ({"mlp.sideways": "colwise"}, "mlp.sideways.*matches no module"),
        ({"mlp.up": "diagonal"}, "unknown style 'diagonal'"),
        ({"mlp.up": "embedding_rowwise"}, "mlp.up is a Linear"),
        ({"mlp": "colwise"}, "mlp is a Mlp"),
    ],
)
def test_a_plan_that_cannot_be_followed_is_refused(plan: Mapping[str, str], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        model_shape(user_model(plan))


def test_a_group_of_another_size_or_rank_is_refused() -> None:
    shape = model_shape(decoder())
    state = ShardState(decoder(), shape, Shard(0, shape.depth, 1, 2))
    with pytest.raises(ValueError, match="rank 0 of a group of 2"):
        on_ranks(2, lambda group: set_group(state.stage, group))


@pytest.mark.parametrize("parts", [2, 4])
def test_vocab_parallel_loss_is_cross_entropy(parts: int) -> None:
    logits = (torch.randn(7, 12, dtype=torch.float64) * 8).requires_grad_()
    targets = torch.tensor([0, 11, 5, -100, 3, 6, -100])
    expected = nn.functional.cross_entropy(logits, targets, reduction="sum")
    (expected_grad,) = torch.autograd.grad(3 * expected, logits)

    def part(group: ThreadGroup) -> tuple[Tensor, Tensor, Tensor]:
        mine = logits.detach().chunk(parts, -1)[group.rank].clone().requires_grad_()
        loss, tokens = cross_entropy(mine, targets, group)
        (grad,) = torch.autograd.grad(3 * loss, mine)
        assert group.calls == 1
        return loss.detach(), tokens, grad

    ranks = on_ranks(parts, part)
    for loss, tokens, _ in ranks:
        torch.testing.assert_close(loss, expected.detach(), rtol=1e-12, atol=0)
        assert tokens == 5 and torch.equal(loss, ranks[0][0])
    torch.testing.assert_close(torch.cat([grad for *_, grad in ranks], -1), expected_grad, rtol=1e-12, atol=1e-14)


def test_vocab_parallel_loss_survives_a_slice_without_finite_logits() -> None:
    logits = torch.randn(3, 8)
    logits[1, :4] = float("-inf")
    targets = torch.tensor([1, 6, 7])

    def part(group: ThreadGroup) -> Tensor:
        mine = logits.chunk(2, -1)[group.rank].clone().requires_grad_()
        loss, _ = cross_entropy(mine, targets, group)
        (grad,) = torch.autograd.grad(loss, mine)
        assert grad.isfinite().all()
        return loss.detach()

    expected = nn.functional.cross_entropy(logits, targets, reduction="sum")
    for loss in on_ranks(2, part):
        torch.testing.assert_close(loss, expected)


def test_low_precision_logits_are_summed_in_float32() -> None:
    logits, targets = torch.randn(64, 32).bfloat16(), torch.randint(0, 32, (64,))
    expected = nn.functional.cross_entropy(logits.float(), targets, reduction="sum")

    def part(group: ThreadGroup) -> tuple[Tensor, torch.dtype]:
        mine = logits.chunk(2, -1)[group.rank].clone().requires_grad_()
        loss, _ = cross_entropy(mine, targets, group)
        (grad,) = torch.autograd.grad(loss, mine)
        return loss.detach(), grad.dtype

    alone, _ = cross_entropy(logits, targets)
    torch.testing.assert_close(alone, expected)
    for loss, dtype in on_ranks(2, part):
        torch.testing.assert_close(loss, expected)
        assert loss.dtype == torch.float32 and dtype == torch.bfloat16
