"""How one layer is made: for its shapes alone, or with the values that it gives itself; its dropout is keyed.

A module draws its first values from global generators. Here these are seeded by (seed, layer), so that everybody who
makes a layer gets the same bits, whichever other layers it makes; and put back as they were.
"""

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from hashlib import blake2b
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from evenkeel.engine.random import GENERATORS, KeyedDropout

Build = Callable[[], nn.Module]


def build_shapes(build: Build) -> nn.Module:
    """The layer with its parameters on the meta device. The values of its buffers mean nothing.

    Made on the CPU without filling parameters, whose memory is therefore never touched: to calculate with tensors on
    the meta device, as `torch.randn(n) * 0.02` does, makes torch 2.13 import its compiler, 2 to 5 s in every process.
    """
    with _seeded(0, ""), torch.device("cpu"), _WithoutInit():
        layer = keyed_dropout(build())
    empty: dict[int, nn.Parameter] = {}
    for module in layer.modules():
        for name, parameter in module.named_parameters(recurse=False):
            meta = torch.empty_like(parameter, device="meta")
            setattr(module, name, empty.setdefault(id(parameter), nn.Parameter(meta, parameter.requires_grad)))
    return layer


def build_values(build: Build, seed: int, name: str) -> nn.Module:
    """The layer on the CPU as it makes itself: a function of seed and the layer's name."""
    with _seeded(seed, name), torch.device("cpu"):
        return keyed_dropout(build())


def generator_seed(seed: int, name: str) -> int:
    """64 bits for what is drawn under a name."""
    digest = blake2b(name.encode(), key=seed.to_bytes(8, "little"), digest_size=8).digest()
    return int.from_bytes(digest, "little")


@contextmanager
def _seeded(seed: int, name: str) -> Iterator[None]:
    """Seeds torch's, numpy's and Python's own global generators for the while."""
    bits = generator_seed(seed, name)
    with GENERATORS, torch.random.fork_rng(devices=[]):
        ours, numpys = random.getstate(), np.random.get_state()
        torch.default_generator.manual_seed(bits)
        random.seed(bits)
        np.random.seed(bits & 0xFFFFFFFF)
        try:
            yield
        finally:
            random.setstate(ours)
            np.random.set_state(numpys)


_FILLS = (Tensor.normal_, Tensor.uniform_, Tensor.fill_, Tensor.zero_)


class _WithoutInit(TorchFunctionMode):
    """Leaves parameters as they are where they would be filled: by torch.nn.init or in place."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        tensor = kwargs.get("tensor", args[0] if args else None)
        fills = getattr(func, "__module__", "") == "torch.nn.init" or func in _FILLS
        return tensor if fills and isinstance(tensor, nn.Parameter) else func(*args, **kwargs)


def keyed_dropout(layer: nn.Module) -> nn.Module:
    """The layer with each nn.Dropout replaced by a KeyedDropout of the same probability; a layer that is one, whole.

    One that drops everything stays as it is: it draws nothing that matters.
    """
    for path, module in list(layer.named_modules(remove_duplicate=False)):
        if type(module) is not nn.Dropout or module.p >= 1:
            continue
        keyed = KeyedDropout(module.p)
        if not path:
            return keyed
        parent, _, attribute = path.rpartition(".")
        setattr(layer.get_submodule(parent), attribute, keyed)
    return layer
