"""How long each layer of a model takes on this device, and what it keeps for the backward pass: measured.

Layers that are built alike are measured together. Of a small model all layers take their turns, one after another as in
training, so that none finds its parameters in a cache that it would not find them in; of a large one, whose parameters
fit no cache, one of each kind.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import prod
from statistics import median
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from evenkeel.core.model import Shard
from evenkeel.engine.build import build_shapes
from evenkeel.engine.collective import Group, Op
from evenkeel.engine.job import Job
from evenkeel.engine.model import LayerSpec, cast_inputs, default_init, loss_group
from evenkeel.engine.parallel import set_group
from evenkeel.engine.pipeline import Weighted
from evenkeel.engine.random import RandomKey, bind_random
from evenkeel.engine.slowdown import Slowdown
from evenkeel.engine.state import PRECISIONS, ShardState
from evenkeel.plan.memory import state_bytes
from evenkeel.plan.workload import LayerTime

SMALL = 2**30
"""Bytes of state up to which every layer of a model is built."""
WARM_UP = 2
"""Rounds that are not counted: memory is allocated, and libraries choose how to compute."""
FEWEST, MOST = 2, 32
"""Rounds in all. Of as few as WARM_UP the last one counts."""


@dataclass(frozen=True, slots=True)
class LayerProfile:
    """A layer for one micro-batch, on one TP rank.

    Attributes:
        kept_bytes: of all tensors that the backward pass needs, parameters aside.
    """

    time: LayerTime
    kept_bytes: int


def measure_layers(
    job: Job, device: torch.device, budget_s: float, group: Group | None = None, slowdown: Slowdown | None = None
) -> tuple[LayerProfile, ...]:
    """Each layer of the model, on the first micro-batch of the training data or on what else would enter it.

    Args:
        budget_s: after so many seconds no further round begins; FEWEST are made all the same.
        group: the TP group that all members measure together, each calling this; None: TP 1. The times are those of
            its slowest member.
        slowdown: of this device (emulation), as in training.
    """
    slowdown = slowdown or Slowdown()
    kinds = alike(job)
    chosen = range(len(kinds)) if _state_bytes(job) <= SMALL else sorted(set(kinds))
    benches = {index: _Bench(job, index, device, group) for index in chosen}
    until = time.perf_counter() + budget_s
    rounds: list[dict[int, LayerTime]] = []
    while len(rounds) < MOST and not (len(rounds) >= FEWEST and _any_says(time.perf_counter() > until, group, device)):
        taken = {index: bench.run(slowdown) for index, bench in benches.items()}
        rounds.append({index: laps.time() for index, laps in taken.items()})
    counted = rounds[min(WARM_UP, len(rounds) - 1) :]
    found: dict[int, LayerProfile] = {}
    for kind in dict.fromkeys(kinds):
        middle = _middle([taken[index] for taken in counted for index in chosen if kinds[index] == kind])
        found[kind] = LayerProfile(_slowest(middle, group, device), benches[kind].kept_bytes())
    return tuple(found[kind] for kind in kinds)


def output_bytes(job: Job) -> tuple[int, ...]:
    """What each layer hands on of one micro-batch; the last one nothing."""
    return (*(prod(hidden.shape) * hidden.dtype.itemsize for hidden in job.boundaries[1:]), 0)


def alike(job: Job) -> tuple[int, ...]:
    """For each layer the index of the first one that is built like it and takes the same input.

    The last layer, after which the loss comes, is like no other.
    """
    seen: dict[Any, int] = {}
    last = len(job.model.layers) - 1
    return tuple(
        seen.setdefault((_built(spec), job.boundaries[index], index == last), index)
        for index, spec in enumerate(job.model.layers)
    )


def _built(spec: LayerSpec) -> tuple[Any, ...]:
    """What a layer consists of: modules by name and type, what they hold beside tensors, the shapes of these."""
    return tuple(
        (path, type(module).__qualname__, tuple((k, _said(v)) for k, v in vars(module).items()), tuple(_shapes(module)))
        for path, module in build_shapes(spec.build).named_modules()
    )


def _said(value: object) -> str:
    plain = isinstance(value, bool | int | float | str | tuple | list | None)
    return repr(value) if plain else str(getattr(value, "__qualname__", type(value).__qualname__))


def _shapes(module: nn.Module) -> Iterator[tuple[str, tuple[int, ...]]]:
    for name, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
        yield name, tuple(tensor.shape)


def _state_bytes(job: Job) -> int:
    return state_bytes(job.shape, Shard(0, job.shape.depth, 0, 1), job.settings.precision).total


class _Bench:
    """One layer on this device, as a stage of its own; without the optimizer's state, which no pass needs."""

    def __init__(self, job: Job, index: int, device: torch.device, group: Group | None) -> None:
        part, parts = (0, 1) if group is None else (group.rank, group.size)
        shard = Shard(index, index + 1, part, parts, owned=())
        self._loss, self._loss_group = job.model.loss, loss_group(job.model, group)
        self._first, self._last = index == 0, index == job.shape.depth - 1
        self._device = device
        # Processor time: what else a machine does meanwhile is not the layer's. But waiting for the TP group is.
        self._clock = time.thread_time if group is None else time.perf_counter
        self._key = RandomKey(job.settings.seed)
        self._stage = ShardState(job.model, job.shape, shard, job.settings.precision, device, job.settings.seed).stage
        set_group(self._stage, group)
        bind_random(self._stage, self._key)
        generator = torch.Generator(device).manual_seed(job.settings.seed)
        for name, parameter in self._stage.named():
            default_init(name, parameter.data, generator)
        self._input, self._targets = self._samples(job, index, generator)
        self._gradient = None if self._last else self._activations(job, index + 1, generator)

    def run(self, slowdown: Slowdown) -> "_Laps":
        """One forward and one backward pass."""
        self._input.grad = None
        laps = _CudaLaps() if self._device.type == "cuda" else _ClockLaps(self._clock)
        mark = slowdown.begin()
        output = self._forward()
        slowdown.end(mark, 1)
        laps.lap()
        mark = slowdown.begin()
        if output.requires_grad:
            root = output if self._last else Weighted.apply(output, self._gradient)  # type: ignore[no-untyped-call]
            torch.autograd.backward((root,))
        slowdown.end(mark, 1)
        laps.lap()
        return laps

    def kept_bytes(self) -> int:
        """Of the tensors that autograd saves, each piece of memory once; without what is there anyway."""
        there = {t.untyped_storage().data_ptr() for t in (*self._stage.parameters(), *self._stage.buffers())}
        kept: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in there:
                kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        with saved_tensors_hooks(pack, lambda tensor: tensor):
            output = self._forward()
        del output  # not before: what is freed may be given out again, and counted as the same
        return sum(kept.values())

    def _forward(self) -> Tensor:
        self._key.at(1, 0)
        output: Tensor = self._stage(self._input)
        return self._loss(output, self._targets, self._loss_group)[0] if self._last else output

    def _samples(self, job: Job, index: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """What enters the layer, and the targets."""
        dtype = PRECISIONS[job.settings.precision]
        indices = range(min(job.settings.micro_batch, len(job.train)))
        inputs, targets = (cast_inputs(tensor, self._device, dtype) for tensor in job.train.get(indices))
        if self._first:
            return inputs, targets
        hidden = self._activations(job, index, generator)
        return hidden.requires_grad_(hidden.is_floating_point()), targets

    def _activations(self, job: Job, index: int, generator: torch.Generator) -> Tensor:
        """Of the shape and type of what enters this layer."""
        hidden = job.boundaries[index]
        made = torch.zeros(hidden.shape, dtype=hidden.dtype, device=self._device)
        return made.normal_(generator=generator) if hidden.dtype.is_floating_point else made


class _Laps(Protocol):
    """The times of a forward and a backward pass; begins when it is made, then a lap is called after each."""

    def lap(self) -> None: ...

    def time(self) -> LayerTime:
        """Waits for the device if need be."""


class _ClockLaps:
    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._marks = [clock()]

    def lap(self) -> None:
        self._marks.append(self._clock())

    def time(self) -> LayerTime:
        begun, middle, end = self._marks
        return LayerTime(middle - begun, end - middle)


class _CudaLaps:
    """By events in the device's queue, so that nothing waits before a whole round is queued, as in training."""

    def __init__(self) -> None:
        self._events: list[torch.cuda.Event] = []
        self.lap()

    def lap(self) -> None:
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        self._events.append(event)

    def time(self) -> LayerTime:
        begun, middle, end = self._events
        end.synchronize()
        return LayerTime(begun.elapsed_time(middle) / 1000, middle.elapsed_time(end) / 1000)


def _middle(samples: Sequence[LayerTime]) -> LayerTime:
    return LayerTime(median(s.forward_s for s in samples), median(s.backward_s for s in samples))


def _slowest(taken: LayerTime, group: Group | None, device: torch.device) -> LayerTime:
    """Over the members of the group."""
    if group is None:
        return taken
    times = torch.tensor([taken.forward_s, taken.backward_s], dtype=torch.float64, device=device)
    group.all_reduce(times, Op.MAX)
    forward_s, backward_s = times.tolist()
    return LayerTime(forward_s, backward_s)


def _any_says(here: bool, group: Group | None, device: torch.device) -> bool:
    """The same answer on every member of the group."""
    if group is None:
        return here
    said = torch.tensor([float(here)], dtype=torch.float64, device=device)
    group.all_reduce(said, Op.MAX)
    return bool(said.item())
