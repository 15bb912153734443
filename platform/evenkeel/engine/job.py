"""What a worker is to train: model, data, settings, and what happens to the result. The same in every worker."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from statistics import mean
from typing import Protocol

import torch
from torch import Tensor

from evenkeel.core.boxes import Box
from evenkeel.core.ids import Version, WorkerId
from evenkeel.core.model import ModelShape
from evenkeel.engine.faults import FaultPlan
from evenkeel.engine.model import Hidden, Model, boundaries_of, model_shape
from evenkeel.engine.state import PRECISIONS
from evenkeel.engine.told import Clean
from evenkeel.plan.samples import sample_indices


class Dataset(Protocol):
    """Samples by index, of one type. Micro-batches are of one shape, but where every pipeline is a single stage."""

    def __len__(self) -> int: ...

    def get(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Inputs and targets on CPU, each with its first dimension as long as `indices`."""


LOOKED_AT = 4
"""Micro-batches that tell what is usual."""


@dataclass(frozen=True, slots=True)
class Settings:
    """Numbers of a training run; names and meaning as in the configuration (design, section 10).

    Attributes:
        global_batch, micro_batch: in samples; the first is a multiple of the second.
        precision: "fp32", "bf16" or "fp64".
        eval_every: every so many steps the version before the step is validated; 0: never.
        eval_batches: micro-batches of one validation, the same ones each time; fewer if the data has fewer.
        slowdown: by rank, how many times as long a pass is to take; see engine/slowdown.py.
        slow_from, slow_to: the first and last step of that; None: to the end.
    """

    seed: int
    last_step: int
    global_batch: int
    micro_batch: int
    learning_rate: float = 3e-4
    weight_decay: float = 0.1
    warmup_steps: int = 0
    schedule: str = "cosine"
    grad_clip: float = 0.0
    precision: str = "fp32"
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    eval_every: int = 0
    eval_batches: int = 8
    slowdown: Mapping[int, float] = field(default_factory=dict)
    slow_from: int = 1
    slow_to: int | None = None
    faults: tuple[FaultPlan, ...] = ()

    @property
    def micro_batches(self) -> int:
        return self.global_batch // self.micro_batch


@dataclass(frozen=True, slots=True)
class FinalTensors:
    """The trained model, one whole tensor at a time so that nobody holds all of it. To be iterated once, to the end.

    A tensor may be kept: nobody writes to it again.

    Attributes:
        shapes: of every parameter, in the order in which `tensors` gives them.
        dtype: of all.
    """

    shapes: Mapping[str, tuple[int, ...]]
    dtype: torch.dtype
    tensors: Iterable[tuple[str, Tensor]]


@dataclass(frozen=True, slots=True)
class Piece:
    """A box of one tensor of the state, as a checkpoint has it.

    Attributes:
        tensor: "KIND/PARAMETER", as in plan/state.py.
        shape: of the whole tensor.
        data: the elements of the box, row by row, flat and contiguous, on the host.
    """

    tensor: str
    shape: tuple[int, ...]
    box: Box
    data: Tensor


class CheckpointError(Exception):
    """A checkpoint is not what was written, or not there. One line, which names the file.

    Args:
        file: by its name in the checkpoint's folder; "" for the manifest.
    """

    def __init__(self, text: str, file: str = "") -> None:
        super().__init__(text)
        self.file = file


def _never(_: int) -> bool:
    return False


@dataclass
class Job:
    """What a worker is to train. Equal in every worker of a run.

    Attributes:
        eval: what is validated on; None for no validation.
        write_final: called once, on rank 0 of the world that commits the last step.
        save: writes a worker's part of the checkpoint of a version, from a thread of its own; tells its fourth argument
            of every error after which it tries again, and calls its last one as often as it gets on. What it returns
            describes the part to whoever completes the checkpoint. None: there is no store.
        load: fills the pieces from the checkpoint of a version, and calls its last argument as often as it gets on.
            Raises CheckpointError.
        fault_once: True for the first caller ever, over all workers and lives of the run, with this index of a fault.
        clean: takes the secrets out of what is told of an error. What the user's code prints itself is not cleaned.
    """

    model: Model
    train: Dataset
    eval: Dataset | None
    settings: Settings
    write_final: Callable[[FinalTensors], None] | None = None
    save: Callable[[Version, WorkerId, Sequence[Piece], Callable[[str], None], Callable[[], None]], str] | None = None
    load: Callable[[Version, Sequence[Piece], Callable[[], None]], None] | None = None
    fault_once: Callable[[int], bool] = _never
    clean: Clean = str

    def prepare(self) -> None:
        """Works out what every layout needs, so that a ready worker loses no time over it when it is given a place.

        Raises:
            ValueError: if the engine cannot train the model.
        """
        _ = self.shape, self.boundaries

    @cached_property
    def shape(self) -> ModelShape:
        return model_shape(self.model)

    @cached_property
    def boundaries(self) -> tuple[Hidden, ...]:
        """What enters each layer, for one micro-batch."""
        inputs, _ = self.train.get((0,) * self.settings.micro_batch)
        return boundaries_of(self.model, inputs, PRECISIONS[self.settings.precision])

    @cached_property
    def usual_work(self) -> float:
        """Elements of one micro-batch's inputs: the mean of the first ones of the run, as they may differ in length."""
        s = self.settings
        first = (
            sample_indices(
                s.seed, 1, micro, micro_batch=s.micro_batch, global_batch=s.global_batch, dataset_size=len(self.train)
            )
            for micro in range(min(s.micro_batches, LOOKED_AT))
        )
        return mean(self.train.get(indices)[0].numel() for indices in first) or 1.0
