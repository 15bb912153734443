"""What a dataset is to the engine: samples by index, the same ones for everybody who asks."""

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Protocol

import torch
from torch import Tensor


class Dataset(Protocol):
    """Samples 0 to len - 1. A sample is a pure function of its index: on every worker, at any time."""

    def __len__(self) -> int: ...

    def get(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Inputs and targets of a micro-batch on CPU, each with its first dimension as long as `indices`.

        All of one shape, such as padded to one length, where pipelines have more than one stage.
        """

    def fingerprint(self) -> str:
        """Equal for equal data; tells that a run goes on with what it began with."""


@dataclass(frozen=True, slots=True)
class Data:
    """What a run trains on, and what it is validated on, if anything.

    Attributes:
        vocab_size: samples are token ids below this; None: they are none, or it is not known.
    """

    train: Dataset
    eval: Dataset | None = None
    vocab_size: int | None = None


class TensorDataset:
    """Samples held in memory: row i of `inputs` with row i of `targets`.

    Raises:
        ValueError: if they differ in length.
    """

    def __init__(self, inputs: Tensor, targets: Tensor) -> None:
        if len(inputs) != len(targets):
            raise ValueError(f"{len(inputs)} inputs and {len(targets)} targets")
        self._inputs, self._targets = inputs, targets

    def __len__(self) -> int:
        return len(self._inputs)

    def get(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        rows = torch.tensor(indices, dtype=torch.int64)
        return self._inputs[rows], self._targets[rows]

    def fingerprint(self) -> str:
        digest = blake2b(digest_size=16)
        for tensor in (self._inputs, self._targets):
            digest.update(f"{tensor.dtype} {tuple(tensor.shape)} ".encode())
            digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
        return digest.hexdigest()
