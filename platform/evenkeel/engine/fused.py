"""Stands in, on the meta device, for operations that devices run as one fused kernel, which keeps less for the backward
pass than the single operations that PyTorch would make of them there."""

from collections.abc import Callable, Sequence
from functools import partial
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode


class FusedKernels(TorchFunctionMode):
    """Calls of F.scaled_dot_product_attention, and on GPUs of F.rms_norm, give tensors without values.

    Args:
        device_type: "cuda" or "cpu", where PyTorch makes single operations of F.rms_norm.

    Attributes:
        forward_flops, backward_flops: of the attention, which no counter sees.
    """

    def __init__(self, device_type: str) -> None:
        super().__init__()
        self._norms = device_type != "cpu"
        self.forward_flops = self.backward_flops = 0.0

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is F.scaled_dot_product_attention:
            return self._attend(*args, **(kwargs or {}))
        if func is F.rms_norm and self._norms:
            return _normalise(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))

    def _attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        **_: Any,
    ) -> Any:
        rows, columns = query.shape[-2], key.shape[-2]
        pairs = prod(query.shape[:-2]) * (_below_diagonal(rows, columns) if is_causal else rows * columns)
        width, out = query.shape[-1], value.shape[-1]
        self.forward_flops += 2 * pairs * (width + out)
        went_back = partial(self._went_back, 2 * pairs * (3 * width + 2 * out))
        return _Attention.apply(query, key, value, went_back)  # type: ignore[no-untyped-call]

    def _went_back(self, flops: float) -> None:
        self.backward_flops += flops


def _below_diagonal(rows: int, columns: int) -> int:
    """Elements (i, j) with j <= i of a matrix."""
    square = min(rows, columns)
    return square * (square + 1) // 2 + (rows - square) * columns


def _out_like(query: Tensor, width: int) -> Tensor:
    same = query.shape[-1] == width
    return torch.empty_like(query) if same else query.new_empty(*query.shape[:-1], width)


class _Attention(torch.autograd.Function):
    """(..., heads, seq, width) to the same, without values: keeps what a fused kernel keeps."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, went_back: Callable[[], None]) -> Tensor:
        # Laid out in memory like the queries, as the kernels do: what follows may then be a view, which takes nothing.
        out = _out_like(query, value.shape[-1])
        wide = torch.promote_types(query.dtype, torch.float32)
        ctx.save_for_backward(query, key, value, out, query.new_empty(query.shape[:-1], dtype=wide))
        ctx.went_back = went_back
        return out

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        query, key, value, *_rest = ctx.saved_tensors
        ctx.went_back()
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value), None


def _normalise(
    input: Tensor, normalized_shape: Sequence[int], weight: Tensor | None = None, eps: float | None = None
) -> Any:
    return _RMSNorm.apply(input, weight, len(normalized_shape))  # type: ignore[no-untyped-call]


class _RMSNorm(torch.autograd.Function):
    """Keeps its input and one number for each vector that is normalised, as PyTorch's kernel for GPUs does."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, dims: int) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        ctx.save_for_backward(x, weight, x.new_empty(x.shape[: x.ndim - dims], dtype=wide))
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple[Tensor, Tensor | None, None]:
        x, weight, _scale = ctx.saved_tensors
        return torch.empty_like(x), None if weight is None else torch.empty_like(weight), None
