"""Tables of complex numbers, like the rotations of Llama's own attention, stay what they are in every precision."""

import pytest
import torch
from torch import Tensor, nn

from evenkeel.core.model import Shard
from evenkeel.engine.model import LayerSpec, Model, boundaries_of, model_shape, whole_model
from evenkeel.engine.state import PRECISIONS, ShardState

WIDTH, LENGTH = 8, 6


class Rotated(nn.Module):
    """Pairs of features, turned by their place in the sequence, then mixed."""

    def __init__(self) -> None:
        super().__init__()
        angles = torch.outer(torch.arange(LENGTH), 0.5 ** torch.arange(WIDTH // 2))
        self.register_buffer("rotations", torch.polar(torch.ones_like(angles), angles), persistent=False)
        self.register_buffer("scale", torch.linspace(1, 2, WIDTH), persistent=False)
        self.mix = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        assert isinstance(self.rotations, Tensor) and isinstance(self.scale, Tensor)
        assert self.scale.dtype == x.dtype
        pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
        return self.mix(torch.view_as_real(pairs * self.rotations).flatten(-2).to(x.dtype) * self.scale)


MODEL = Model(layers=(LayerSpec("a", Rotated), LayerSpec("b", Rotated)))


@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_engine_computes_what_plain_pytorch_does(precision: str) -> None:
    dtype = PRECISIONS[precision]
    state = ShardState(MODEL, model_shape(MODEL), Shard(0, 2, 0, 1), precision)
    state.initialise(seed=1)
    plain = nn.Sequential(Rotated(), Rotated())
    for layer, name in zip(plain, ("a", "b"), strict=True):
        for part in ("weight", "bias"):
            getattr(layer.mix, part).data = state.tensor(f"param/{name}.mix.{part}").clone().reshape_as(
                getattr(layer.mix, part)
            )
    plain = {"fp32": plain.float, "bf16": plain.bfloat16, "fp64": plain.double}[precision]()
    x = torch.randn(2, LENGTH, WIDTH, generator=torch.Generator().manual_seed(2)).to(dtype)
    assert torch.equal(state.stage(x), plain(x))
    assert torch.equal(whole_model(MODEL, 1, dtype)(x), plain(x))
    assert tuple(h.shape for h in boundaries_of(MODEL, x, dtype)) == ((2, LENGTH, WIDTH),) * 2


class Turned(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.by = nn.Parameter(torch.ones(WIDTH, dtype=torch.complex64))


def test_a_complex_parameter_is_refused() -> None:
    with pytest.raises(ValueError, match=r"t\.by is complex"):
        model_shape(Model(layers=(LayerSpec("t", Turned),)))
