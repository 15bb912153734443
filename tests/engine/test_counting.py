"""A model's work, counted without weights: against formulas by hand, and against what a real pass on the CPU keeps."""

from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from tensor_group import ThreadGroup, on_ranks
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

from evenkeel.config import load_config
from evenkeel.core.model import Shard
from evenkeel.engine.counting import count_work
from evenkeel.engine.fused import FusedKernels
from evenkeel.engine.model import LayerSpec, Model, loss_group, model_shape, whole_model
from evenkeel.engine.random import RandomKey, bind_random
from evenkeel.engine.state import PRECISIONS, ShardState
from evenkeel.models.registry import load_model
from own_model import build

ROOT = Path(__file__).parents[2]
SIZES = {"vocab_size": 96, "d_model": 64, "layers": 3, "heads": 4, "kv_heads": 2, "d_ff": 160, "seq_len": 32}
BATCH, SEQ, WIDTH, INNER, VOCABULARY, HEADS, KEYS = 2, 32, 64, 160, 96, 4, 32
TOKENS = BATCH * SEQ


def decoder(**keys: object) -> Model:
    return load_model("decoder", {**SIZES, **keys})


def tokens() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    inputs, targets = torch.randint(0, VOCABULARY, (2, BATCH, SEQ), generator=generator)
    return inputs, targets


def kept_bytes(stage: nn.Module, model: Model, inputs: Tensor, targets: Tensor, group: ThreadGroup | None) -> int:
    """What a real pass keeps for its backward pass, parameters aside."""
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage
        return tensor

    bind_random(stage, RandomKey(1))
    with saved_tensors_hooks(keep, lambda tensor: tensor):
        loss, _ = model.loss(stage(inputs), targets, loss_group(model, group))
    loss.backward()
    held = {tensor.untyped_storage().data_ptr() for tensor in stage.parameters()}
    return sum(storage.nbytes() for place, storage in kept.items() if place not in held)


# ---------------------------------------------------------------- against formulas


def test_the_decoders_matrix_products_are_those_of_the_formula() -> None:
    embed, *blocks, head = count_work(decoder(), *tokens(), "fp32").layers
    weights = WIDTH * (2 * WIDTH + 2 * KEYS) + 3 * WIDTH * INNER
    pairs = BATCH * HEADS * SEQ * (SEQ + 1) // 2
    each = WIDTH // HEADS
    assert (embed.forward_flops, embed.backward_flops) == (0, 0)
    assert {b.forward_flops for b in blocks} == {2 * TOKENS * weights + 4 * pairs * each}
    # Backward: twice the products with weights; of the attention the scores again, and the gradients of four factors.
    assert {b.backward_flops for b in blocks} == {4 * TOKENS * weights + 10 * pairs * each}
    assert head.forward_flops == 2 * TOKENS * WIDTH * VOCABULARY
    assert head.backward_flops == 2 * head.forward_flops


def test_the_decoders_parameters_and_what_is_cut_of_them() -> None:
    embed, *blocks, head = count_work(decoder(), *tokens(), "fp32").layers
    cut = WIDTH * (2 * WIDTH + 2 * KEYS) + 3 * WIDTH * INNER
    assert (embed.params, embed.split_params) == (VOCABULARY * WIDTH, VOCABULARY * WIDTH)
    assert {(b.params, b.split_params) for b in blocks} == {(cut + 2 * WIDTH, cut)}
    assert (head.params, head.split_params) == (VOCABULARY * WIDTH + WIDTH, VOCABULARY * WIDTH)


def test_a_tied_parameter_counts_in_both_its_layers() -> None:
    embed, *_, head = count_work(decoder(tie_embeddings=True), *tokens(), "fp32").layers
    assert embed.split_params == head.split_params == VOCABULARY * WIDTH


@pytest.mark.parametrize(("precision", "width"), [("fp32", 4), ("bf16", 2), ("fp64", 8)])
def test_what_a_block_keeps_on_a_gpu_is_what_the_formula_says(precision: str, width: int) -> None:
    work = count_work(decoder(), *tokens(), precision)
    block = work.layers[2]
    wide = max(width, 4)
    # Two norms with input and scale, their outputs, query, key, value, output of the attention and a number per row.
    features = 4 * WIDTH + (2 * WIDTH + 2 * KEYS) + 4 * INNER
    table = 2 * SEQ * WIDTH // HEADS // 2  # cosines and sines
    assert block.kept_bytes == TOKENS * (width * features + wide * (2 + HEADS)) + width * table
    assert block.output_bytes == TOKENS * WIDTH * width
    # What the ranks of a TP group hold slices of; the norms and their outputs are whole on each.
    assert block.split_kept_bytes == TOKENS * (width * (2 * WIDTH + 2 * KEYS + 4 * INNER) + wide * HEADS)


def test_a_tp_group_sums_twice_in_each_block_and_direction() -> None:
    embed, *blocks, head = count_work(decoder(), *tokens(), "bf16").layers
    hidden = TOKENS * WIDTH * 2
    assert {b.tensor_bytes for b in blocks} == {2 * hidden}
    # Forward only, and backward only with the loss's three float32 numbers per token and rank: half of it each way.
    assert embed.tensor_bytes == hidden // 2
    assert head.tensor_bytes == (hidden + 2 * 3 * 4 * TOKENS) // 2


# ---------------------------------------------------------------- against real passes


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp64"])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_it_keeps_what_a_real_pass_on_the_cpu_keeps(precision: str, dropout: float) -> None:
    model = decoder(dropout=dropout)
    stage = whole_model(model, seed=1, dtype=PRECISIONS[precision])
    work = count_work(model, *tokens(), precision, "cpu")
    counted = sum(layer.kept_bytes for layer in work.layers)
    # All blocks of a process share one table of rotations.
    table = 2 * SEQ * WIDTH // HEADS // 2 * PRECISIONS[precision].itemsize
    assert counted - (SIZES["layers"] - 1) * table == kept_bytes(stage, model, *tokens(), None)


def test_what_a_tp_rank_keeps_is_what_a_real_one_keeps() -> None:
    model = decoder(layers=2)
    shape = model_shape(model)
    work = count_work(model, *tokens(), "fp32", "cpu")

    def run(group: ThreadGroup) -> int:
        state = ShardState(model, shape, Shard(0, shape.depth, group.rank, group.size), "fp32")
        state.initialise(seed=1)
        state.set_group(group)
        return kept_bytes(state.stage, model, *tokens(), group)

    real = on_ranks(2, run)
    counted = sum(layer.kept_bytes - layer.split_kept_bytes // 2 for layer in work.layers)
    # The masks of a cut embedding are there only where it is cut, and the loss keeps its gradient and not its input.
    assert counted == pytest.approx(real[0], rel=0.02)
    assert counted >= real[0] - TOKENS * WIDTH


def test_a_model_of_ones_own_against_a_real_pass() -> None:
    model = build({"widths": [48, 24]})
    inputs, targets = torch.randn(16, 64), torch.arange(16) % 10
    work = count_work(model, inputs, targets, "fp32", "cpu")
    stage = whole_model(model, seed=1)
    with FlopCounterMode(display=False) as forward:
        loss, _ = model.loss(stage(inputs), targets, None)
    with FlopCounterMode(display=False) as backward:
        loss.backward()
    assert sum(layer.forward_flops for layer in work.layers) == forward.get_total_flops()
    assert sum(layer.backward_flops for layer in work.layers) == backward.get_total_flops()
    assert sum(layer.kept_bytes for layer in work.layers) == kept_bytes(stage, model, inputs, targets, None)
    assert (work.tokens, work.tensor_divides) == (16, 1)
    assert {layer.split_params for layer in work.layers} == {0}


@pytest.mark.parametrize("causal", [False, True])
def test_attention_without_values_keeps_what_the_kernel_of_the_cpu_keeps(causal: bool) -> None:
    def run(device: str) -> list[tuple[tuple[int, ...], str]]:
        query = torch.zeros(2, 4, 32, 16, device=device, requires_grad=True)
        key, value = (torch.zeros(2, 2, 32, 16, device=device, requires_grad=True) for _ in range(2))
        kept: list[Tensor] = []
        with saved_tensors_hooks(lambda tensor: (kept.append(tensor), tensor)[1], lambda tensor: tensor):
            out = F.scaled_dot_product_attention(query, key, value, is_causal=causal, enable_gqa=True)
        assert out.is_contiguous()
        return sorted((tuple(tensor.shape), str(tensor.dtype)) for tensor in kept)

    with FusedKernels("cpu"):
        counted = run("meta")
    assert counted == run("cpu")


# ---------------------------------------------------------------- sizes, and what cannot be counted


def test_the_model_of_70_billion_parameters_of_the_documentation_is_counted() -> None:
    config = load_config([ROOT / "conf/decoder-70b.yaml"])
    model = load_model(config.model.name, config.model.options)
    inputs = torch.zeros(config.train.micro_batch, 4096, dtype=torch.int64)
    work = count_work(model, inputs, inputs, config.train.precision)
    assert sum(layer.params for layer in work.layers) == 70_553_706_496
    assert (work.tokens, work.tensor_divides, len(work.layers)) == (4096, 8, 82)
    assert len({layer.kept_bytes for layer in work.layers[1:-1]}) == 1


def test_ignored_targets_are_no_tokens() -> None:
    inputs, targets = tokens()
    targets[0, :5] = -100
    assert count_work(decoder(layers=1), inputs, targets, "fp32").tokens == TOKENS - 5


class Looks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.linear(x) * (2 if x.sum().item() > 0 else 1)
        return out


def test_a_layer_that_looks_at_values_is_named() -> None:
    model = Model(layers=(LayerSpec("first", partial(nn.Linear, 8, 8)), LayerSpec("looks", Looks)))
    with pytest.raises(ValueError, match="layer 'looks' cannot be counted without values of tensors: "):
        count_work(model, torch.zeros(4, 8), torch.zeros(4, dtype=torch.int64), "fp32")
