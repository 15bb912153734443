"""Tensor parallelism by a plan of names: plain nn.Linear and nn.Embedding are replaced by layers that hold a cut.

The plan uses the vocabulary of Hugging Face models: "colwise" cuts a linear layer's outputs (the input is whole, the
output is a rank's slice), "rowwise" its inputs (slice in, whole sum out), "embedding_rowwise" the vocabulary of an
embedding, "colwise_gather_output" (formerly "colwise_rep") is colwise with the output made whole. What no pattern
names is replicated. Layers after Shoeybi et al., "Megatron-LM", 2019: its f (identity forward, all-reduce backward)
and g (all-reduce forward, identity backward) are `_CopyIn` and `_ReduceOut` here.

With one part nothing is replaced, so that it costs nothing.
"""

from collections.abc import Iterator, Mapping
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from evenkeel.engine.random import KeyedDropout

COLWISE, ROWWISE, EMBEDDING, GATHERED = "colwise", "rowwise", "embedding_rowwise", "colwise_gather_output"
_ALIASES = {"colwise_rep": GATHERED}
STYLES = (COLWISE, ROWWISE, EMBEDDING, GATHERED, *_ALIASES)


class TensorGroup(Protocol):
    """What parallel layers need of a process group."""

    @property
    def rank(self) -> int: ...

    @property
    def size(self) -> int: ...

    def all_reduce(self, tensor: Tensor) -> object:
        """Sums a contiguous tensor over the group in place, with the same bits on every rank."""


class TensorContext:
    """What the parallel layers of one stage share: which cut they hold, and the group to sum over.

    Linear layers that take the same input (query, key and value; gate and up) pass it through one f, so that its
    gradient is summed over the group once and not once for each of them.
    """

    def __init__(self, part: int, parts: int) -> None:
        self.part, self.parts = part, parts
        self.group: TensorGroup | None = None
        self._input: Tensor | None = None
        self._copy: Tensor | None = None

    def all_reduce(self, tensor: Tensor) -> None:
        if self.group is None:
            raise RuntimeError("tensor-parallel layers have no group: call set_group(stage, group) first")
        self.group.all_reduce(tensor)

    def copy_in(self, x: Tensor) -> Tensor:
        if not (x.requires_grad and torch.is_grad_enabled()):
            return x
        if self._input is not x or self._copy is None:
            self._input, self._copy = x, _CopyIn.apply(x, self)  # type: ignore[no-untyped-call]
        return self._copy

    def forget(self, *_: object) -> None:
        """To be called at the end of each layer's forward pass; keeps no activation alive beyond it."""
        self._input = self._copy = None


class _CopyIn(torch.autograd.Function):
    """f: the identity; its gradient is summed over the group."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, context: TensorContext) -> Tensor:
        ctx.context = context
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        # In place: only parallel linear layers read f's output, and what their backward gives belongs to nobody else.
        grad = grads[0].contiguous()
        ctx.context.all_reduce(grad)
        return grad, None


class _ReduceOut(torch.autograd.Function):
    """g: the sum over the group, in place; its gradient passes as it is."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, context: TensorContext) -> Tensor:
        context.all_reduce(x)
        ctx.mark_dirty(x)
        return x

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


class _GatherOut(torch.autograd.Function):
    """The slices of the last dimension of all ranks, side by side; the gradient, equal on all, is cut again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, context: TensorContext) -> Tensor:
        ctx.slice = (context.part * x.shape[-1], x.shape[-1])
        whole = x.new_zeros(*x.shape[:-1], x.shape[-1] * context.parts)
        whole.narrow(-1, *ctx.slice).copy_(x)
        context.all_reduce(whole)
        return whole

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0].narrow(-1, *ctx.slice), None


class ParallelLayer(nn.Module):
    """A layer that holds a cut of its weights. `tensor` is shared by all of a stage."""

    def __init__(self, tensor: TensorContext) -> None:
        super().__init__()
        self.tensor = tensor

    def extra_repr(self) -> str:
        shapes = {name: tuple(p.shape) for name, p in self.named_parameters()}
        return f"part {self.tensor.part} of {self.tensor.parts}, {shapes}"


class ColumnLinear(ParallelLayer):
    """(..., in) to the rank's slice of (..., out), or to all of it if `gather`."""

    def __init__(self, linear: nn.Linear, tensor: TensorContext, gather: bool) -> None:
        super().__init__(tensor)
        self.gather = gather
        self.weight = _cut(linear.weight, 0, tensor)
        self.bias = None if linear.bias is None else _cut(linear.bias, 0, tensor)

    def forward(self, x: Tensor) -> Tensor:
        y = F.linear(self.tensor.copy_in(x), self.weight, self.bias)
        if not self.gather:
            return y
        whole: Tensor = _GatherOut.apply(y, self.tensor)  # type: ignore[no-untyped-call]
        return whole


class RowLinear(ParallelLayer):
    """The rank's slice of (..., in) to all of (..., out)."""

    def __init__(self, linear: nn.Linear, tensor: TensorContext) -> None:
        super().__init__(tensor)
        self.weight = _cut(linear.weight, 1, tensor)
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = _ReduceOut.apply(F.linear(x, self.weight), self.tensor)  # type: ignore[no-untyped-call]
        return y if self.bias is None else y + self.bias


class VocabEmbedding(ParallelLayer):
    """Token ids (...) to (..., width); each rank looks up the ids of its slice of the vocabulary."""

    def __init__(self, embedding: nn.Embedding, tensor: TensorContext) -> None:
        super().__init__(tensor)
        self.weight = _cut(embedding.weight, 0, tensor)

    def forward(self, ids: Tensor) -> Tensor:
        local = ids - self.tensor.part * self.weight.shape[0]
        elsewhere = (local < 0) | (local >= self.weight.shape[0])
        rows = F.embedding(local.masked_fill(elsewhere, 0), self.weight)
        rows = rows.masked_fill(elsewhere.unsqueeze(-1), 0)
        y: Tensor = _ReduceOut.apply(rows, self.tensor)  # type: ignore[no-untyped-call]
        return y


def _cut(parameter: Tensor, dim: int, tensor: TensorContext) -> nn.Parameter:
    """Memory for the rank's part of a parameter, without values."""
    shape = list(parameter.shape)
    shape[dim] //= tensor.parts
    return nn.Parameter(parameter.detach().new_empty(shape))


def matched(layer: nn.Module, name: str, plan: Mapping[str, str]) -> Iterator[tuple[str, nn.Module, str, str]]:
    """(path within the layer, module, style, pattern) of each module that the plan names.

    Patterns match full names; "*" stands for one component. The first pattern that matches decides.

    Raises:
        ValueError: for a style that does not exist, or that does not fit the module.
    """
    for path, module in layer.named_modules():
        parts = f"{name}.{path}".rstrip(".").split(".")
        for pattern, style in plan.items():
            if _matches(pattern.split("."), parts):
                _check_style(module, style, pattern, ".".join(parts))
                yield path, module, _ALIASES.get(style, style), pattern
                break


def _matches(pattern: list[str], parts: list[str]) -> bool:
    return len(pattern) == len(parts) and all(p in ("*", q) for p, q in zip(pattern, parts, strict=True))


def _check_style(module: nn.Module, style: str, pattern: str, name: str) -> None:
    if style not in STYLES:
        raise ValueError(f"tp_plan[{pattern!r}]: unknown style {style!r}; expected one of {', '.join(STYLES)}")
    kind = type(module)
    fits = (
        (kind is nn.Linear and style != EMBEDDING)
        or (kind is nn.Embedding and style in (EMBEDDING, ROWWISE) and module.padding_idx is None)
        or (kind is KeyedDropout and style == COLWISE)
    )
    if not fits:
        raise ValueError(f"tp_plan[{pattern!r}]: {name} is a {kind.__name__}, which {style!r} does not fit")


def splits(layer: nn.Module, name: str, plan: Mapping[str, str]) -> dict[str, int]:
    """The dimension along which each cut parameter of an uncut layer is cut, by its name within the layer."""
    dims: dict[str, int] = {}
    for path, module, style, _ in matched(layer, name, plan):
        for local, _ in module.named_parameters(recurse=False):
            if style == ROWWISE and isinstance(module, nn.Linear):
                if local == "weight":
                    dims[f"{path}.{local}".lstrip(".")] = 1
            else:
                dims[f"{path}.{local}".lstrip(".")] = 0
    return dims


def parallelize(layer: nn.Module, name: str, plan: Mapping[str, str], tensor: TensorContext) -> nn.Module:
    """The layer with what the plan names replaced by its cut; a layer that is itself named is replaced whole."""
    if tensor.parts == 1:
        return layer
    for path, module, style, _ in list(matched(layer, name, plan)):
        if isinstance(module, KeyedDropout):
            module.part, module.parts = tensor.part, tensor.parts
            continue
        replacement = _replacement(module, style, tensor)
        if not path:
            layer = replacement
        else:
            parent, _, attribute = path.rpartition(".")
            setattr(layer.get_submodule(parent), attribute, replacement)
    layer.register_forward_hook(tensor.forget)
    return layer


def _replacement(module: nn.Module, style: str, tensor: TensorContext) -> nn.Module:
    if isinstance(module, nn.Embedding):
        return VocabEmbedding(module, tensor)
    assert isinstance(module, nn.Linear)
    if style == ROWWISE:
        return RowLinear(module, tensor)
    return ColumnLinear(module, tensor, gather=style == GATHERED)


def set_group(module: nn.Module, group: TensorGroup | None) -> None:
    """Makes every parallel layer within `module` sum over `group`: all that a new generation has to change."""
    for part in module.modules():
        if isinstance(part, ParallelLayer):
            if group is not None and (group.rank, group.size) != (part.tensor.part, part.tensor.parts):
                held = f"part {part.tensor.part} of {part.tensor.parts}"
                raise ValueError(f"rank {group.rank} of a group of {group.size} for layers that hold {held}")
            part.tensor.group = group
