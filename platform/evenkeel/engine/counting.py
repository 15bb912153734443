"""What a model asks of its devices, counted without weights or arithmetic: on torch's meta device, layer by layer.

Matrix products are counted by torch.utils.flop_counter, what is kept for the backward pass by saved_tensors_hooks, and
what tensor parallelism cuts and sums by counting each layer a second time as one rank of a TP group would run it.

Attention is counted as fused kernels do it (Dao et al., "FlashAttention", 2022): they keep queries, keys, values, the
output and one number per row of the scores, compute the scores again in the backward pass, and skip what a causal mask
hides. Attention that does not call F.scaled_dot_product_attention itself, nn.MultiheadAttention's among it, is counted
operation by operation, with its scores kept.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from math import prod

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

from evenkeel.core.model import ModelShape
from evenkeel.engine.build import build_shapes
from evenkeel.engine.fused import FusedKernels
from evenkeel.engine.loss import IGNORED
from evenkeel.engine.model import LayerSpec, Model, build_stage, cast, cast_inputs, loss_group, model_shape
from evenkeel.engine.parallel import set_group, splits
from evenkeel.engine.random import RandomKey, bind_random
from evenkeel.engine.state import PRECISIONS
from evenkeel.plan.workload import LayerWork, Workload

META = torch.device("meta")


def count_work(model: Model, inputs: Tensor, targets: Tensor, precision: str, device_type: str = "cuda") -> Workload:
    """The work of one micro-batch. Layers that are built alike, as functools.partial shows it, are counted once.

    A tied parameter counts in each layer that uses it: on different stages each holds it.

    Args:
        inputs, targets: of one micro-batch; of the inputs only shape and type matter.
        precision: train.precision.
        device_type: "cuda", or "cpu" for what PyTorch keeps there.

    Raises:
        ValueError: naming the layer, if its forward or backward pass needs the values of tensors.
    """
    shape = model_shape(model)
    tokens = len(targets) if targets.is_floating_point() else int((targets != IGNORED).sum())
    whole = _count(model, inputs, targets, precision, device_type, 1)
    parts = _smallest_divisor(shape.tensor_divides)
    cut = _count(model, inputs, targets, precision, device_type, parts) if parts > 1 else whole
    layers = tuple(_layer_work(shape, i, whole, cut, parts) for i in range(shape.depth))
    return Workload(layers, precision, tokens, shape.tensor_divides)


@dataclass(frozen=True, slots=True)
class _Counts:
    """Of one layer, on one TP rank.

    Attributes:
        inner: bytes kept, input and output aside.
        keeps_input, keeps_output: whether these are among what it keeps.
        entry, exit: bytes of the input and of the output.
        summed: bytes that the TP group sums in both passes.
    """

    forward_flops: float
    backward_flops: float
    inner: int
    keeps_input: bool
    keeps_output: bool
    entry: int
    exit: int
    summed: int


def _layer_work(
    shape: ModelShape, index: int, whole: Sequence[_Counts], cut: Sequence[_Counts], parts: int
) -> LayerWork:
    layer, counts = shape.layers[index], whole[index]
    params = [*layer.params, *(shape.param(tie) for tie in layer.ties)]
    kept = _kept(whole, index)
    # kept = whole part + split part, and on a rank of `parts` = whole part + split part / parts
    split = (kept - _kept(cut, index)) * parts / (parts - 1) if parts > 1 else 0.0
    return LayerWork(
        name=layer.name,
        forward_flops=counts.forward_flops,
        backward_flops=counts.backward_flops,
        params=sum(prod(p.shape) for p in params),
        split_params=sum(prod(p.shape) for p in params if p.split is not None),
        kept_bytes=kept,
        split_kept_bytes=min(kept, max(0, round(split))),
        output_bytes=counts.exit,
        tensor_bytes=cut[index].summed // 2,
    )


def _kept(layers: Sequence[_Counts], index: int) -> int:
    """What layer `index` keeps. What one layer hands to the next, both may keep: it counts once, for the later one."""
    counts = layers[index]
    handed = counts.keeps_input or (index > 0 and layers[index - 1].keeps_output)
    return counts.inner + (counts.entry if handed else 0)


def _smallest_divisor(n: int) -> int:
    """Above 1; of 1 it is 1."""
    return next((d for d in range(2, n + 1) if n % d == 0), 1)


# ---------------------------------------------------------------- one TP rank


def _count(
    model: Model, inputs: Tensor, targets: Tensor, precision: str, device_type: str, parts: int
) -> tuple[_Counts, ...]:
    """Of each layer, on TP rank 0 of `parts`."""
    dtype = PRECISIONS[precision]
    x = torch.empty_like(cast_inputs(inputs, META, dtype))
    y = torch.empty_like(targets, device=META)
    last = len(model.layers) - 1
    counted: list[_Counts] = []
    known: list[tuple[LayerSpec, Mapping[str, int], Tensor, _Counts, Tensor]] = []
    for index, spec in enumerate(model.layers):
        cuts = splits(build_shapes(spec.build), spec.name, model.tp_plan)
        same = (k for k in known if _alike(k[0], spec) and k[1] == cuts and _like(k[2], x))
        if index != last and (found := next(same, None)) is not None:
            counted.append(found[3])
            x = found[4]
            continue
        try:
            counts, out = _count_layer(model, index, x, y if index == last else None, dtype, device_type, parts)
        except (NotImplementedError, RuntimeError) as error:
            text = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise ValueError(f"layer {spec.name!r} cannot be counted without values of tensors: {text}") from error
        counted.append(counts)
        known.append((spec, cuts, x, counts, out))
        x = out
    return tuple(counted)


def _alike(a: LayerSpec, b: LayerSpec) -> bool:
    """Whether two layers are built by the same function of equal arguments."""
    if not (isinstance(a.build, partial) and isinstance(b.build, partial)):
        return a.build is b.build
    return (a.build.func, a.build.args, a.build.keywords) == (b.build.func, b.build.args, b.build.keywords)


def _like(a: Tensor, b: Tensor) -> bool:
    return (a.shape, a.dtype, a.requires_grad) == (b.shape, b.dtype, b.requires_grad)


class _Group:
    """A TP group of this process alone, which counts the bytes that it is to sum."""

    def __init__(self, size: int) -> None:
        self.rank, self.size, self.summed = 0, size, 0

    def all_reduce(self, tensor: Tensor) -> None:
        self.summed += _size(tensor)


def _count_layer(
    model: Model,
    index: int,
    inputs: Tensor,
    targets: Tensor | None,
    dtype: torch.dtype,
    device_type: str,
    parts: int,
) -> tuple[_Counts, Tensor]:
    """One layer, with the loss if there are targets; also its output, which takes gradients as the next one's input."""
    group = _Group(parts)
    stage = cast(build_stage(model, index, index + 1, 0, parts, device=META), dtype)
    set_group(stage, group if parts > 1 else None)
    bind_random(stage, RandomKey(0))
    kept: dict[int, torch.UntypedStorage] = {}
    kernels = FusedKernels(device_type)
    with torch.random.fork_rng(devices=[]):
        with FlopCounterMode(display=False) as forward, saved_tensors_hooks(partial(_keep, kept), _unchanged), kernels:
            output: Tensor = stage(inputs)
            result = output if targets is None else model.loss(output, targets, loss_group(model, group))[0]
        with FlopCounterMode(display=False) as backward:
            if result.requires_grad:
                torch.autograd.backward((result,), (torch.empty_like(result),))
    held = {id(t.untyped_storage()) for t in (*stage.parameters(), *stage.buffers())}
    entry, exit_ = inputs.untyped_storage(), output.untyped_storage()
    ends = {id(entry)} if targets is not None else {id(entry), id(exit_)}
    counts = _Counts(
        forward_flops=forward.get_total_flops() + kernels.forward_flops,
        backward_flops=backward.get_total_flops() + kernels.backward_flops,
        inner=sum(storage.nbytes() for key, storage in kept.items() if key not in held | ends),
        keeps_input=id(entry) in kept,
        keeps_output=targets is None and id(exit_) in kept and exit_ is not entry,
        entry=entry.nbytes(),
        exit=0 if targets is not None else _size(output),
        summed=group.summed,
    )
    following = torch.empty_like(output).requires_grad_(output.is_floating_point())
    return counts, following


def _keep(kept: dict[int, torch.UntypedStorage], tensor: Tensor) -> Tensor:
    # A storage has one Python object as long as that is referred to; views of one keep it once.
    storage = tensor.untyped_storage()
    kept[id(storage)] = storage
    return tensor


def _unchanged(tensor: Tensor) -> Tensor:
    return tensor


def _size(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
