"""Flat buffers of a shard: views, order, alignment, equal beginnings in every layout, low precision."""

from typing import Any

import pytest
import torch
from torch import nn

from evenkeel.core.boxes import cut
from evenkeel.core.ids import WorkerId
from evenkeel.core.layout import Layout, Pipeline, Stage, sync_groups
from evenkeel.core.model import Shard
from evenkeel.engine.model import Model, initial_values, model_shape, whole_model
from evenkeel.engine.state import Region, ShardState
from evenkeel.models.registry import load_model
from evenkeel.plan.state import slices

SMALL = {"vocab_size": 40, "d_model": 24, "layers": 3, "heads": 4, "kv_heads": 2, "d_ff": 40, "seq_len": 16}


def decoder(**keys: Any) -> Model:
    return load_model("decoder", {**SMALL, **keys})


def shard_state(model: Model, shard: Shard | None = None, precision: str = "fp32") -> ShardState:
    shape = model_shape(model)
    return ShardState(model, shape, shard or Shard(0, shape.depth, 0, 1), precision)


def loss_of(model: Model, state: ShardState) -> torch.Tensor:
    inputs, targets = torch.arange(66).remainder(40).view(2, 33)[:, :-1], torch.arange(64).remainder(7).view(2, 32)
    loss, _ = model.loss(state.stage(inputs), targets, None)
    return loss


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp64"])
@pytest.mark.parametrize("tie_embeddings", [False, True])
def test_every_tensor_is_an_aligned_view_of_the_buffers(precision: str, tie_embeddings: bool) -> None:
    state = shard_state(decoder(tie_embeddings=tie_embeddings), Shard(1, 5, 1, 2), precision)
    for name, parameter in state.stage.named():
        for kind in ("param", "exp_avg", "exp_avg_sq"):
            view = state.tensor(f"{kind}/{name}")
            assert view.shape == parameter.shape == state.box(f"{kind}/{name}").shape
            assert view.data_ptr() % 64 == 0
        assert parameter.data_ptr() % 64 == 0
        shares_memory = parameter.data_ptr() == state.tensor(f"param/{name}").data_ptr()
        assert shares_memory == (precision != "bf16")
    assert all(region.start * state.params.itemsize % 64 == 0 for region in state.regions)


def test_a_shard_holds_the_slices_that_plans_say() -> None:
    model = decoder(tie_embeddings=True)
    shape = model_shape(model)
    for shard in (Shard(0, 5, 0, 1), Shard(0, 2, 1, 2), Shard(2, 5, 0, 2)):
        state = shard_state(model, shard)
        for piece in slices(shape, shard):
            assert state.box(piece.tensor) == piece.box
            assert tuple(state.tensor(piece.tensor).shape) == piece.box.shape
        with pytest.raises(KeyError):
            state.tensor("param/blocks.7.attention.query.weight")


@pytest.mark.parametrize("tie_embeddings", [False, True])
def test_every_layout_begins_with_the_same_bits(tie_embeddings: bool) -> None:
    model = decoder(tie_embeddings=tie_embeddings)
    shape = model_shape(model)
    full = {name: p.detach() for name, p in whole_model(model, seed=3).named()}
    for shard in (Shard(0, 5, 0, 1), Shard(0, 2, 0, 2), Shard(0, 2, 1, 2), Shard(2, 5, 1, 2)):
        state = shard_state(model, shard)
        state.initialise(3)
        for name, box in state.boxes.items():
            assert torch.equal(state.tensor(f"param/{name}"), full[name][box.slices])
            param = shape.param(name)
            assert box == cut(param.shape, param.split, shard.part, shard.parts)


def test_initial_values_depend_on_seed_and_name_alone() -> None:
    model, norm = decoder(), "head.norm.weight"
    first, second = (f"blocks.{i}.attention.query.weight" for i in range(2))

    def values(seed: int, *names: str) -> dict[str, torch.Tensor]:
        shapes = {param.name: param.shape for param in model_shape(model).params(0, 5)}
        return dict(initial_values(model, seed, {name: shapes[name] for name in names}))

    query = values(1, first)[first]
    torch.manual_seed(99)
    again = values(1, norm, second, first)
    assert torch.equal(query, again[first]) and not torch.equal(query, again[second])
    assert not torch.equal(query, values(2, first)[first])
    assert torch.equal(again[norm], torch.ones(24))
    assert abs(float(query.std()) - 0.02) < 0.003


@pytest.mark.parametrize("precision", ["fp32", "fp64"])
def test_gradients_add_up_in_place_in_the_buffer(precision: str) -> None:
    model = decoder()
    state = shard_state(model, precision=precision)
    state.initialise(0)
    addresses = {name: p.grad.data_ptr() for name, p in state.stage.named() if p.grad is not None}
    loss_of(model, state).backward()
    once = state.grads.clone()
    assert once.abs().sum() > 0
    loss_of(model, state).backward()
    torch.testing.assert_close(state.grads, 2 * once)
    for name, parameter in state.stage.named():
        assert parameter.grad is not None and parameter.grad.data_ptr() == addresses[name]
        assert torch.equal(parameter.grad, state.grad(name))
    state.zero_grad()
    assert not any(p.grad is None or p.grad.any() for _, p in state.stage.named())


def test_tied_parameters_are_one_tensor_within_a_stage() -> None:
    model = decoder(tie_embeddings=True)
    state = shard_state(model)
    embed, head = state.stage.layers[0], state.stage.layers[-1]
    assert embed.tokens.weight is head.output.weight
    assert [name for name in state.boxes if "output.weight" in name and name.startswith("head")] == []
    assert state.regions[0].names == ("embed.tokens.weight",) and state.regions[0].layer == -1


def test_bf16_computes_low_and_keeps_high() -> None:
    model = decoder()
    state = shard_state(model, precision="bf16")
    state.initialise(0)
    exact = shard_state(model)
    exact.initialise(0)
    assert state.params.dtype == state.grads.dtype == torch.float32
    for _ in range(2):
        loss_of(model, state).backward()
        loss_of(model, exact).backward()
    for name, parameter in state.stage.named():
        assert parameter.dtype == torch.bfloat16 and parameter.grad is None
        assert torch.equal(parameter, state.tensor(f"param/{name}").bfloat16())
        exact_grad = exact.grad(name)
        assert (state.grad(name) - exact_grad).norm() < 0.05 * exact_grad.norm()
    state.params.add_(1.0)
    state.publish()
    for name, parameter in state.stage.named():
        assert torch.equal(parameter, state.tensor(f"param/{name}").bfloat16())


def test_each_sync_group_is_one_range_that_covers_its_regions() -> None:
    model = decoder(tie_embeddings=True)
    shape = model_shape(model)
    w = [WorkerId(f"w{i}") for i in range(10)]
    layout = Layout(
        (
            Pipeline((Stage(0, 3, (w[0], w[1])), Stage(3, 5, (w[2], w[3]))), 0, 2),
            Pipeline((Stage(0, 1, (w[4], w[5])), Stage(1, 4, (w[6], w[7])), Stage(4, 5, (w[8], w[9]))), 2, 4),
        )
    )
    for worker in layout.members:
        state = shard_state(model, layout.shard(worker))
        mine = [group for group in sync_groups(layout, shape) if worker in group.members]
        covered = torch.zeros_like(state.grads)
        for group in mine:
            span = state.span(group.params)
            covered[span] += 1
            inside = {name for r in state.regions if span.start <= r.start < span.stop for name in r.names}
            assert inside == set(group.params)
        assert torch.equal(covered, torch.ones_like(covered))


def test_a_range_that_is_not_whole_is_refused() -> None:
    state = shard_state(decoder(), Shard(1, 3, 0, 1))
    with pytest.raises(ValueError, match="contiguous"):
        state.span(["blocks.0.attention.query.weight"])
    with pytest.raises(KeyError):
        state.span(["head.norm.weight"])


def test_regions_tell_what_is_cut_and_what_decays() -> None:
    def kinds(region: Region) -> set[tuple[bool, bool]]:
        return {(shape.param(n).split is not None, len(shape.param(n).shape) >= 2) for n in region.names}

    model = decoder()
    shape = model_shape(model)
    state = shard_state(model, Shard(0, 5, 1, 2))
    for region in state.regions:
        assert kinds(region) == {(region.cut, region.decay)}
    assert [r.stop for r in state.regions[:-1]] == [r.start for r in state.regions[1:]]
    assert state.regions[-1].stop == state.params.numel()


def test_constant_tables_are_real_and_states_of_layers_are_refused() -> None:
    class Scaled(nn.Module):
        def __init__(self, persistent: bool) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)
            self.register_buffer("table", torch.arange(4.0), persistent=persistent)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.linear(x) * self.table

    from evenkeel.engine.model import LayerSpec

    model = Model((LayerSpec("only", lambda: Scaled(False)),))
    state = shard_state(model, precision="fp64")
    state.initialise(0)
    assert torch.equal(state.stage.layers[0].table, torch.arange(4.0, dtype=torch.float64))
    assert state.stage(torch.ones(2, 4, dtype=torch.float64)).shape == (2, 4)
    with pytest.raises(ValueError, match=r"only\.table is a buffer"):
        model_shape(Model((LayerSpec("only", lambda: Scaled(True)),)))
    with pytest.raises(ValueError, match=r"norm\..* is a buffer"):
        model_shape(Model((LayerSpec("norm", lambda: nn.BatchNorm1d(4)),)))


def test_beginning_tells_that_it_gets_on() -> None:
    state = shard_state(decoder())
    moved: list[int] = []
    state.initialise(0, lambda: moved.append(1))
    assert len(moved) == len(list(state.stage.named()))
