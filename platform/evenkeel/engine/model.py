"""What the engine trains: a model as a sequence of layers, and how a range of them is built, cut and initialised.

A layer is a factory of an nn.Module that takes one tensor and returns one: the first takes the dataset's inputs, the
last returns what the loss takes. A model of one's own is a function that returns a Model:

    def build(config):
        widths = [64, *config.get("widths", [32, 32]), 10]
        layers = [LayerSpec(f"layer{i}", partial(make_layer, a, b)) for i, (a, b) in enumerate(pairwise(widths))]
        return Model(layers=tuple(layers))

Its parameters begin as its modules set them, but as a function of the run's seed and the layer's name, and so does what
is random in a forward pass (engine/random.py): who holds a layer changes nothing.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from math import gcd
from typing import Protocol, TypeVar

import torch
from torch import Tensor, nn

from evenkeel.core.model import LayerShape, ModelShape, ParamShape
from evenkeel.engine.build import build_shapes, build_values, generator_seed
from evenkeel.engine.loss import cross_entropy
from evenkeel.engine.parallel import TensorContext, TensorGroup, matched, parallelize, splits
from evenkeel.engine.random import KeyedDropout, LayerSeed


class Loss(Protocol):
    """The last layer's output and the dataset's targets to (summed loss, number of tokens or samples in it).

    The sum, not the mean: the engine divides once, by the tokens of the whole global batch. `group` is None unless
    the model says `vocab_parallel` and the TP degree is above 1.
    """

    def __call__(self, output: Tensor, targets: Tensor, group: TensorGroup | None, /) -> tuple[Tensor, Tensor]: ...


class Init(Protocol):
    """Fills a whole parameter, float32 on CPU, with its initial values, drawing from `generator` alone."""

    def __call__(self, name: str, tensor: Tensor, generator: torch.Generator, /) -> None: ...


def default_init(name: str, tensor: Tensor, generator: torch.Generator) -> None:
    """Normal with deviation 0.02 for matrices, zeros for biases, ones for the weights of norms."""
    if tensor.ndim >= 2:
        tensor.normal_(0.0, 0.02, generator=generator)
    elif name.endswith("bias"):
        tensor.zero_()
    else:
        tensor.fill_(1.0)


@dataclass(frozen=True, slots=True)
class LayerSpec:
    """One layer.

    Attributes:
        name: unique; parameters are called "<name>.<name within the module>".
        build: makes the module, on the CPU; called several times by each worker. Its nn.Dropout are replaced by
            KeyedDropout. Constants belong into buffers with persistent=False.
        cost: forward and backward time relative to the other layers.
        ties: full name, in an earlier layer, of a parameter that this layer's parameter is, by the name here.
    """

    name: str
    build: Callable[[], nn.Module]
    cost: float = 1.0
    ties: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Model:
    """A model to train.

    Attributes:
        layers: in order of the forward pass.
        tp_plan: pattern of module names to style; see engine/parallel.py. Between layers activations are whole, so a
            "colwise" layer and the "rowwise" one that takes its slices belong into one layer.
        tensor_divides: a number that every TP degree must divide, such as the number of heads; it need not account
            for the cut dimensions themselves.
        vocab_parallel: the last layer's output is a rank's slice of the last dimension.
        init: sets the initial values of all parameters, in place of the modules themselves.
        data_options: keys of the configuration's section `data` that the model decides where the user did not.
        vocab_size: how many token ids the model knows, if its inputs are token ids; None: not said.
    """

    layers: tuple[LayerSpec, ...]
    loss: Loss = cross_entropy
    tp_plan: Mapping[str, str] = field(default_factory=dict)
    tensor_divides: int = 0
    init: Init | None = None
    vocab_parallel: bool = False
    data_options: Mapping[str, object] = field(default_factory=dict)
    vocab_size: int | None = None


def loss_group(model: Model, group: TensorGroup | None) -> TensorGroup | None:
    """The group to call the loss with."""
    return group if model.vocab_parallel and group is not None and group.size > 1 else None


class Stage(nn.Module):
    """Layers start to stop of a model, cut for one TP rank. Its parameters are named as in the whole model.

    Attributes:
        owners: for each parameter's full name, the modules that use it and under which attribute.
    """

    def __init__(
        self, start: int, layers: Mapping[str, nn.Module], owners: Mapping[str, list[tuple[nn.Module, str]]]
    ) -> None:
        super().__init__()
        self.start = start
        self.layers = nn.ModuleList(layers.values())
        self.seeds = nn.ModuleList(LayerSeed(layer, name) for name, layer in layers.items())
        self.owners = owners

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x

    def named(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Each parameter once, by its full name, in order of first use."""
        for name, users in self.owners.items():
            module, attribute = users[0]
            yield name, getattr(module, attribute)

    def assign(self, name: str, parameter: nn.Parameter) -> None:
        """Puts a parameter in its place, or its places."""
        for module, attribute in self.owners[name]:
            setattr(module, attribute, parameter)


def build_stage(
    model: Model,
    start: int,
    stop: int,
    part: int = 0,
    parts: int = 1,
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> Stage:
    """Layers start to stop for TP rank `part` of `parts`: parameters on the meta device, for `assign`; buffers real.

    Args:
        seed: of the run, for what is random in buffers.
    """
    tensor = TensorContext(part, parts)
    layers: dict[str, nn.Module] = {}
    owners: dict[str, list[tuple[nn.Module, str]]] = {}
    for spec in model.layers[start:stop]:
        layer = parallelize(build_shapes(spec.build), spec.name, model.tp_plan, tensor)
        _fill_buffers(layer, spec, torch.device(device), seed)
        for path, module in layer.named_modules():
            if isinstance(module, KeyedDropout):
                module.stream = f"{spec.name}.{path}"
        for name, users in _owners(layer, spec).items():
            owners.setdefault(name, []).extend(users)
        layers[spec.name] = layer
    return Stage(start, layers, owners)


def _fill_buffers(layer: nn.Module, spec: LayerSpec, device: torch.device, seed: int) -> None:
    """Tables that a layer computes when it is made; they are in no checkpoint."""
    if not any(True for _ in layer.buffers()):
        return
    made = build_values(spec.build, seed, spec.name)
    for path, module in layer.named_modules():
        for name, _ in list(module.named_buffers(recurse=False)):
            setattr(module, name, made.get_submodule(path).get_buffer(name).to(device))


def _owners(layer: nn.Module, spec: LayerSpec) -> dict[str, list[tuple[nn.Module, str]]]:
    """Users of each parameter of a layer by its full name. One that the layer itself shares goes by its first name."""
    owners: dict[str, list[tuple[nn.Module, str]]] = {}
    names: dict[int, str] = {}
    for path, module in layer.named_modules():
        for attribute, parameter in module.named_parameters(recurse=False):
            local = f"{path}.{attribute}".lstrip(".")
            name = names.setdefault(id(parameter), spec.ties.get(local, f"{spec.name}.{local}"))
            owners.setdefault(name, []).append((module, attribute))
    return owners


def model_shape(model: Model) -> ModelShape:
    """The model's layers and parameters, without memory for them.

    Raises:
        ValueError: naming layer and parameter, for what the engine could not train: equal names, ties that lead
            nowhere, buffers that belong to the state, frozen parameters, a plan that fits nothing.
    """
    if not model.layers:
        raise ValueError("a model needs at least one layer")
    names = [spec.name for spec in model.layers]
    if len(set(names)) < len(names):
        raise ValueError(f"two layers of the model are called {next(n for n in names if names.count(n) > 1)!r}")
    shapes: list[LayerShape] = []
    known: dict[str, ParamShape] = {}
    used: set[str] = set()
    divides = model.tensor_divides
    for spec in model.layers:
        layer = build_shapes(spec.build)
        _check_state(layer, spec)
        used |= {pattern for *_, pattern in matched(layer, spec.name, model.tp_plan)}
        dims = splits(layer, spec.name, model.tp_plan)
        shape = _layer_shape(layer, spec, dims, known)
        twice = [param.name for param in shape.params if param.name in known]
        if twice:
            raise ValueError(f"two parameters of the model are called {twice[0]!r}; choose other names of layers")
        known |= {param.name: param for param in shape.params}
        divides = gcd(divides, *(p.shape[p.split] for p in shape.params if p.split is not None))
        shapes.append(shape)
    unused = [pattern for pattern in model.tp_plan if pattern not in used]
    if unused:
        raise ValueError(f"tp_plan[{unused[0]!r}] matches no module of the model")
    return ModelShape(tuple(shapes), divides if any(p.split is not None for p in known.values()) else 1)


def _check_state(layer: nn.Module, spec: LayerSpec) -> None:
    for name, parameter in layer.named_parameters():
        if not parameter.requires_grad:
            raise ValueError(f"{spec.name}.{name} does not require a gradient; frozen parameters are not supported")
        if parameter.is_complex():
            raise ValueError(f"{spec.name}.{name} is complex; hold its parts in a real one, see torch.view_as_complex")
    saved = layer.state_dict().keys() - {n for n, _ in layer.named_parameters(remove_duplicate=False)}
    if saved:
        raise ValueError(
            f"{spec.name}.{min(saved)} is a buffer that training changes or a checkpoint would need; use a layer "
            "without running statistics, or register constants with persistent=False"
        )


def _layer_shape(
    layer: nn.Module, spec: LayerSpec, dims: Mapping[str, int], known: Mapping[str, ParamShape]
) -> LayerShape:
    params: list[ParamShape] = []
    for local, parameter in layer.named_parameters():
        shape = ParamShape(spec.ties.get(local, f"{spec.name}.{local}"), tuple(parameter.shape), dims.get(local))
        if local not in spec.ties:
            params.append(shape)
        elif known.get(shape.name) != shape:
            home = known.get(shape.name, "no parameter of an earlier layer")
            raise ValueError(f"layer {spec.name!r} ties {local!r} to {shape.name!r}, which is {home}, not {shape}")
    absent = spec.ties.keys() - {local for local, _ in layer.named_parameters()}
    if absent:
        raise ValueError(f"layer {spec.name!r} ties {min(absent)!r}, but has no such parameter")
    return LayerShape(spec.name, tuple(params), spec.cost, tuple(spec.ties.values()))


_CHEAP = 2e10
"""Operations that take a CPU less time than torch takes to get ready for the meta device: Python code for some
operations there makes it import its compiler, for 1 to 3 s."""


@dataclass(frozen=True, slots=True)
class Hidden:
    """Shape and type of what one layer hands to the next."""

    shape: tuple[int, ...]
    dtype: torch.dtype


def boundaries_of(model: Model, inputs: Tensor, dtype: torch.dtype) -> tuple[Hidden, ...]:
    """What enters each layer, whole on each TP rank. A layer of the user's may give another type than `dtype`.

    Found by a forward pass; for large models by one without memory or arithmetic.

    Args:
        inputs: any tensor of the shape and type of one micro-batch's inputs.
        dtype: of parameters and activations.
    """
    layers = [build_shapes(spec.build) for spec in model.layers]
    size = sum(parameter.numel() for layer in layers for parameter in layer.parameters())
    device = "cpu" if 2 * size * inputs.numel() < _CHEAP else "meta"
    x = torch.zeros(inputs.shape, dtype=dtype if inputs.is_floating_point() else inputs.dtype, device=device)
    found: list[Hidden] = []
    with torch.no_grad():
        for layer in layers:
            found.append(Hidden(tuple(x.shape), x.dtype))
            _zero_parameters(layer, device)
            x = cast(layer, dtype).eval()(x)
    return tuple(found)


def _zero_parameters(layer: nn.Module, device: str) -> None:
    if device != "cpu":
        layer.to(device)
    for module in layer.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            setattr(module, name, nn.Parameter(torch.zeros(parameter.shape, dtype=parameter.dtype, device=device)))


_CASTS = {torch.float32: nn.Module.float, torch.bfloat16: nn.Module.bfloat16, torch.float64: nn.Module.double}
Cast = TypeVar("Cast", bound=nn.Module)


def cast(module: Cast, dtype: torch.dtype) -> Cast:
    """The module with all that is floating-point in it, and nothing else, in this type.

    `module.to(dtype)` would cast complex buffers too, such as tables of rotations, and so drop their imaginary parts.
    """
    _CASTS[dtype](module)
    return module


def cast_inputs(inputs: Tensor, device: torch.device | str, dtype: torch.dtype) -> Tensor:
    """A micro-batch as the first layer takes it: token ids stay integers, features get the parameters' type."""
    return inputs.to(device, dtype if inputs.is_floating_point() else inputs.dtype)


def initial_values(model: Model, seed: int, shapes: Mapping[str, tuple[int, ...]]) -> Iterator[tuple[str, Tensor]]:
    """Whole parameters at the start, on the CPU: functions of seed and name, whatever the layout.

    Of a model without an `init` of its own, one layer at a time is held.

    Args:
        shapes: by full names; tied parameters under the name that they have in their first layer.
    """
    if model.init is None:
        for spec in model.layers:
            if any(name.startswith(f"{spec.name}.") for name in shapes):
                for local, parameter in build_values(spec.build, seed, spec.name).named_parameters():
                    name = f"{spec.name}.{local}"
                    if local not in spec.ties and name in shapes:
                        yield name, parameter.detach()
        return
    for name, shape in shapes.items():
        generator = torch.Generator().manual_seed(generator_seed(seed, name))
        tensor = torch.empty(shape)
        with torch.no_grad():
            model.init(name, tensor, generator)
        yield name, tensor


def whole_model(
    model: Model, seed: int, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> Stage:
    """All layers, initialised, for one process: what a plain PyTorch loop trains."""
    stage = build_stage(model, 0, len(model.layers), device=device, seed=seed)
    shapes = {name: tuple(parameter.shape) for name, parameter in stage.named()}
    for name, value in initial_values(model, seed, shapes):
        stage.assign(name, nn.Parameter(value.to(device, dtype)))
    return cast(stage, dtype)
