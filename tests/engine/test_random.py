"""Keyed random numbers: the same for whoever draws them, and good enough to be called random."""

import math
from itertools import pairwise

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from evenkeel.engine.random import KeyedDropout, RandomKey, bind_random, random_bits

CPU = torch.device("cpu")


def bits(shape: tuple[int, ...], *, seed: int = 1, step: int = 1, micro: int = 0, stream: str = "a") -> torch.Tensor:
    key = RandomKey(seed)
    key.at(step, micro)
    return random_bits(key.words(stream), shape, CPU)


def dropout(p: float, *, part: int = 0, parts: int = 1) -> KeyedDropout:
    layer = KeyedDropout(p)
    layer.stream, layer.part, layer.parts = "blocks.0.dropout", part, parts
    key = RandomKey(4)
    key.at(2, 3)
    bind_random(layer, key)
    return layer


def test_the_bits_are_these_for_ever() -> None:
    # A run that goes on with another version must draw what it drew before.
    assert bits((2, 3), seed=2**64 - 1).tolist() == [[-1166, 28856, 7590], [-7334, -14478, 30201]]


@pytest.mark.parametrize(("width", "parts"), [(16, 2), (16, 4), (12, 4), (10, 2), (6, 3)])
def test_ranks_draw_their_slice_of_the_same_mask(width: int, parts: int) -> None:
    x = torch.ones(3, 5, width)
    whole = dropout(0.5)(x)
    pieces = [dropout(0.5, part=part, parts=parts)(x.chunk(parts, -1)[part]) for part in range(parts)]
    assert torch.equal(torch.cat(pieces, -1), whole)


def test_the_same_micro_batch_has_the_same_mask_and_others_have_others() -> None:
    layer = dropout(0.5)
    assert layer.key is not None
    x = torch.ones(64, 64)
    first = layer(x)
    torch.manual_seed(0)
    layer.key.at(2, 3)
    assert torch.equal(layer(x), first)
    layer.key.at(2, 4)
    other = layer(x)
    layer.key.at(2, 3)
    assert torch.equal(layer(x), first) and not torch.equal(other, first)
    layer.key.at(2, 3)
    layer.stream = "blocks.1.dropout"
    assert not torch.equal(layer(x), first)


def test_used_twice_in_a_forward_pass_it_draws_two_masks() -> None:
    layer, x = dropout(0.5), torch.ones(64, 64)
    assert layer.key is not None
    first, second = layer(x), layer(x)
    assert not torch.equal(first, second)
    layer.key.at(2, 3)  # as when a step is run again
    assert torch.equal(layer(x), first) and torch.equal(layer(x), second)


def test_a_mask_that_the_backward_pass_would_have_to_draw_again_is_refused() -> None:
    x = torch.ones(4, 4, requires_grad=True)
    y = checkpoint(dropout(0.5), x, use_reentrant=False)
    with pytest.raises(RuntimeError, match="computed again in the backward pass"):
        y.sum().backward()


def test_large_draws_are_the_same_as_small_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    small = bits((12, 8))
    monkeypatch.setattr("evenkeel.engine.random._KEPT", 0)
    assert torch.equal(bits((12, 8)), small)


def test_global_generators_are_left_alone() -> None:
    before = torch.get_rng_state()
    dropout(0.5)(torch.ones(8, 8))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("p", [0.01, 0.1, 0.5, 0.9])
def test_the_share_that_is_dropped_and_the_mean_that_is_kept(p: float) -> None:
    n = 1_000_000
    y = dropout(p)(torch.ones(1000, 1000, dtype=torch.float64))
    deviation = math.sqrt(p * (1 - p) / n)
    assert abs(float((y == 0).double().mean()) - p) < 5 * deviation + 2**-16
    assert abs(float(y.mean()) - 1) < 5 * deviation / (1 - p)


def test_gradients_pass_where_values_pass() -> None:
    layer = dropout(0.3)

    def again(x: torch.Tensor) -> torch.Tensor:
        assert layer.key is not None
        layer.key.at(2, 3)
        y: torch.Tensor = layer(x)
        return y

    x = torch.randn(8, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(again, (x,))


def test_no_dropout_in_evaluation_or_at_probability_zero() -> None:
    x = torch.randn(4, 4)
    assert dropout(0.5).eval()(x) is x
    assert KeyedDropout(0.0)(x) is x
    with pytest.raises(RuntimeError, match="bind_random"):
        KeyedDropout(0.5)(x)
    with pytest.raises(ValueError, match="0 <= p < 1"):
        KeyedDropout(1.0)


def test_low_precision_scales_by_the_exact_number() -> None:
    y = dropout(0.1)(torch.full((64, 64), 256.0, dtype=torch.bfloat16))
    assert set(y.unique().tolist()) == {0.0, float(torch.tensor(256 / (1 - round(0.1 * 65536) / 65536)).bfloat16())}


def chi_square(counts: torch.Tensor) -> float:
    """Deviation from equal counts, in standard deviations of the chi-square distribution."""
    expected = counts.sum() / len(counts)
    statistic = ((counts - expected) ** 2 / expected).sum()
    return float((statistic - (len(counts) - 1)) / math.sqrt(2 * (len(counts) - 1)))


def streams() -> list[torch.Tensor]:
    """Neighbouring keys in every direction."""
    shape = (1 << 18,)
    return [
        bits(shape),
        bits(shape, micro=1),
        bits(shape, micro=2),
        bits(shape, step=2),
        bits(shape, step=3),
        bits(shape, seed=2),
        bits(shape, stream="b"),
    ]


def test_values_and_pairs_of_neighbours_are_evenly_spread() -> None:
    for draw in streams():
        unsigned = draw.int() + 32768
        assert abs(chi_square(torch.bincount(unsigned >> 6, minlength=1024).double())) < 5
        assert abs(chi_square(torch.bincount(unsigned & 1023, minlength=1024).double())) < 5
        for distance in (1, 2, 3, 4, 256):
            pairs = ((unsigned[:-distance] >> 11) << 5) | (unsigned[distance:] >> 11)
            assert abs(chi_square(torch.bincount(pairs, minlength=1024).double())) < 5


def test_neighbouring_keys_are_not_correlated() -> None:
    drawn = [draw.double() / 2**15 for draw in streams()]
    for a, b in pairwise(drawn):
        correlation = float((a * b).mean() * 3)
        assert abs(correlation) < 5 / math.sqrt(len(a))
    for draw in drawn:
        for distance in (1, 4, 64, 256):
            correlation = float((draw[:-distance] * draw[distance:]).mean() * 3)
            assert abs(correlation) < 5 / math.sqrt(len(draw))


def test_every_bit_of_the_key_and_of_the_index_matters() -> None:
    n = 1 << 16
    reference = bits((n,)).int()
    for i in range(64):
        flipped = reference ^ bits((n,), seed=1 ^ (1 << i)).int()
        ones = sum(float((flipped >> bit & 1).double().mean()) for bit in range(16)) / 16
        assert abs(ones - 0.5) < 5 * 0.5 / math.sqrt(16 * n)
