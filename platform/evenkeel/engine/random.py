"""Random numbers that depend on what is computed, not on who computes it: the source of dropout masks.

A counter-based generator: element i of a draw is a hash of i under a key made of (seed, step, micro-batch, layer).
The same micro-batch therefore gets the same mask on any device, in any process and launch, also when it is computed
again, and each tensor-parallel rank draws just its slice of it.

That is what KeyedDropout draws by, and a model's nn.Dropout is replaced by it. Whatever else draws in a forward pass
takes from torch's own generators, which are seeded by (seed, step, micro-batch, layer) as each layer begins: the same
on any worker with the same kind of device, but not over kinds of devices, nor over TP degrees where the input is cut.

The hash is the finaliser of SplitMix64 (Steele, Lea and Flood, "Fast splittable pseudorandom number generators",
2014), with half of a 128-bit key before each of its multiplications. Its 64 bits serve four neighbouring elements
with 16 bits each. Only integer operations are used, so that every device gives the same bits.
"""

from functools import lru_cache
from hashlib import blake2b
from struct import pack
from threading import Lock
from typing import Any

import torch
from torch import Tensor, nn

from evenkeel.engine.compat import in_backward

GENERATORS = Lock()
"""Held while global generators are seeded and drawn from to make a layer: ranks may be threads of one process."""

_MASK = (1 << 64) - 1
_LANES = 4
_RANGE = 1 << 16
_KEPT = 1 << 22


def _signed(x: int) -> int:
    """The int64 with the bits of the unsigned x."""
    x &= _MASK
    return x - (1 << 64) if x >> 63 else x


_GOLDEN = _signed(0x9E3779B97F4A7C15)
_FIRST = _signed(0xBF58476D1CE4E5B9)
_SECOND = _signed(0x94D049BB133111EB)


class RandomKey:
    """Where the training is: what the masks of all dropouts that share this object are drawn for.

    Each training thread has one of its own and moves it with `at` before each forward pass.
    """

    __slots__ = ("micro", "moves", "seed", "step")

    def __init__(self, seed: int) -> None:
        self.seed, self.step, self.micro = seed, 0, 0
        self.moves = 0

    def at(self, step: int, micro: int) -> None:
        """Step counts from 1, micro from 0 within the global batch (not within a pipeline's share)."""
        self.step, self.micro = step, micro
        self.moves += 1

    def words(self, stream: str) -> tuple[int, int]:
        """128 bits for one draw, as two signed 64-bit words."""
        digest = blake2b(pack("<QQQ", self.seed, self.step, self.micro) + stream.encode(), digest_size=16).digest()
        return int.from_bytes(digest[:8], "little", signed=True), int.from_bytes(digest[8:], "little", signed=True)


def random_bits(
    words: tuple[int, int], shape: tuple[int, ...], device: torch.device, part: int = 0, parts: int = 1
) -> Tensor:
    """16 uniform bits per element of `shape`, as int16.

    Args:
        shape: of the slice that is drawn: the `part`-th of `parts` equal ones along the last dimension.
    """
    width = shape[-1] if shape else 1
    rows = 1
    for side in shape[:-1]:
        rows *= side
    if parts > 1 and width % _LANES:
        whole = random_bits(words, (*shape[:-1], width * parts), device)
        return whole.narrow(-1, part * width, width)
    counters_of = _kept_counters if rows * width <= _KEPT else _counters
    counters = counters_of(rows, width, part, parts, device)
    bits = _hash(counters, words).view(torch.int16)
    return bits[: rows * width].view(shape)


def _counters(rows: int, width: int, part: int, parts: int, device: torch.device) -> Tensor:
    """Index x golden ratio of each group of four elements."""
    if parts == 1:
        indices = torch.arange(-(-rows * width // _LANES), dtype=torch.int64, device=device)
    else:
        each = width // _LANES
        row = torch.arange(rows, dtype=torch.int64, device=device).unsqueeze(1)
        indices = (row * (each * parts) + torch.arange(part * each, (part + 1) * each, device=device)).flatten()
    return indices * _GOLDEN


_kept_counters = lru_cache(maxsize=64)(_counters)
"""The same few shapes come again and again; large ones are not kept, as they take 2 bytes per element."""


def _hash(counters: Tensor, words: tuple[int, int]) -> Tensor:
    x = counters ^ words[0]
    spare = torch.empty_like(x)
    _fold(x, 30, spare).mul_(_FIRST).add_(words[1])
    _fold(x, 27, spare).mul_(_SECOND)
    return _fold(x, 31, spare)


def _fold(x: Tensor, shift: int, spare: Tensor) -> Tensor:
    """x ^= x >> shift in place. The shift of a signed integer copies its sign; the mask takes the copies away."""
    torch.bitwise_right_shift(x, shift, out=spare)
    return x.bitwise_xor_(spare.bitwise_and_((1 << (64 - shift)) - 1))


class KeyedDropout(nn.Module):
    """Dropout whose mask is a function of (seed, step, micro-batch, layer, element); the identity in eval mode.

    A tensor-parallel plan may name it "colwise": then its input is a rank's slice of the last dimension, and it draws
    that slice of the mask. Used several times in one forward pass, it draws another mask each time.

    Args:
        p: probability of zeroing an element, rounded to a multiple of 2**-16.

    Attributes:
        stream: the layer's full name in the model, which keeps its numbers apart from others'; set by build_stage.
        key: shared by all dropouts of a thread; set by bind_random.
        part, parts: the slice of the last dimension that the input is.

    Raises:
        ValueError: if p is not within 0 <= p < 1.
    """

    def __init__(self, p: float) -> None:
        super().__init__()
        if not 0 <= p < 1:
            raise ValueError(f"a dropout probability of {p}; expected 0 <= p < 1")
        self.p = p
        self._dropped = min(round(p * _RANGE), _RANGE - 1)
        self.stream = ""
        self.key: RandomKey | None = None
        self.part, self.parts = 0, 1
        self._move, self._draws = 0, 0

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self._dropped == 0:
            return x
        bits = random_bits(self._words(), tuple(x.shape), x.device, self.part, self.parts)
        keep = torch.ge(bits, self._dropped - _RANGE // 2, out=torch.empty(x.shape, dtype=x.dtype, device=x.device))
        dropped: Tensor = _Scaled.apply(x, keep, _RANGE / (_RANGE - self._dropped))  # type: ignore[no-untyped-call]
        return dropped

    def _words(self) -> tuple[int, int]:
        if self.key is None:
            raise RuntimeError(f"dropout {self.stream!r} has no key: call bind_random(stage, RandomKey(seed)) first")
        if in_backward():
            raise RuntimeError(
                f"dropout {self.stream!r} is computed again in the backward pass, where its mask is not known; "
                "use nn.functional.dropout where activations are checkpointed"
            )
        if self._move != self.key.moves:
            self._move, self._draws = self.key.moves, 0
        stream = f"{self.stream}#{self._draws}" if self._draws else self.stream
        self._draws += 1
        return self.key.words(stream)

    def extra_repr(self) -> str:
        return f"p={self.p}, stream={self.stream!r}"


class _Scaled(torch.autograd.Function):
    """x * keep * scale. The scale stays a Python number, which bfloat16 would round by up to 0.4 %."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, keep: Tensor, scale: float) -> Tensor:
        ctx.save_for_backward(keep)
        ctx.scale = scale
        return (x * keep).mul_(scale)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (keep,) = ctx.saved_tensors
        return (grads[0] * keep).mul_(ctx.scale), None, None


class LayerSeed(nn.Module):
    """Seeds torch's own generators as a layer's forward pass begins.

    Args:
        layer: whose passes are watched.
        name: the layer's name in the model.

    Attributes:
        key: set by bind_random; None: the generators are left as they are.
    """

    def __init__(self, layer: nn.Module, name: str) -> None:
        super().__init__()
        self.name = name
        self.key: RandomKey | None = None
        layer.register_forward_pre_hook(self._seed)

    def _seed(self, _: nn.Module, inputs: tuple[Any, ...]) -> None:
        if self.key is None:
            return
        # Apart from the words of a dropout: those of a layer that is one itself go by the same name.
        bits = self.key.words(f"{self.name}\0")[0] & _MASK
        with GENERATORS:
            torch.default_generator.manual_seed(bits)
        device = inputs[0].device
        if device.type == "cuda":
            torch.cuda.default_generators[device.index].manual_seed(bits)


def bind_random(module: nn.Module, key: RandomKey) -> None:
    """Makes everything random within `module`, a stage or a part of one, draw by `key`."""
    for part in module.modules():
        if isinstance(part, KeyedDropout | LayerSeed):
            part.key = key
