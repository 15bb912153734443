"""What every peer does alike: the configuration's model, data, optimizer, learning rate and clipping, in plain PyTorch.

Of evenkeel a peer uses the model's modules, the dataset and the pure functions that say which samples a micro-batch has
and which learning rate a step. How it is spread over processes, summed and updated is the peer's own.
"""

import json
import os
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from evenkeel.data.registry import load_data
from evenkeel.engine.model import Stage, whole_model
from evenkeel.models.registry import load_model
from evenkeel.plan.learning_rate import learning_rate
from evenkeel.plan.samples import sample_indices

ADAMW: dict[str, Any] = {"lr": 0.0, "betas": (0.9, 0.95), "eps": 1e-8, "fused": True}


class Work:
    """The configuration that ours was given too, and what follows from it."""

    def __init__(self, path: str) -> None:
        self.config: dict[str, Any] = json.loads(Path(path).read_text())
        self.train: dict[str, Any] = self.config["train"]
        self.seed: int = self.config["run"]["seed"]
        self.steps: int = self.train["steps"]
        self.micro_batches: int = self.train["global_batch"] // self.train["micro_batch"]
        options = {k: v for k, v in self.config["model"].items() if k != "name"}
        self.model = load_model(self.config["model"]["name"], options)
        data = {k: v for k, v in self.config["data"].items() if k != "name"}
        self.data = load_data(self.config["data"]["name"], data, self.model).train

    def build(self) -> Stage:
        """The whole model, initialised as ours is."""
        return whole_model(self.model, self.seed)

    @property
    def save_every(self) -> int:
        """Steps between two checkpoints."""
        return int(self.config["checkpoint"]["every_steps"])

    def micro_batch(self, step: int, micro: int) -> tuple[Tensor, Tensor]:
        """Inputs and targets, (micro_batch, seq_len) each."""
        indices = sample_indices(
            self.seed,
            step,
            micro,
            micro_batch=self.train["micro_batch"],
            global_batch=self.train["global_batch"],
            dataset_size=len(self.data),
        )
        inputs, targets = self.data.get(indices)
        return inputs, targets

    def share(self, rank: int, world: int) -> range:
        """A rank's micro-batches of each step."""
        return range(rank * self.micro_batches // world, (rank + 1) * self.micro_batches // world)

    def groups(self, parameters: Iterable[nn.Parameter]) -> list[dict[str, Any]]:
        """Weight decay on matrices only."""
        params = list(parameters)
        groups = [
            {"params": [p for p in params if p.ndim >= 2], "weight_decay": self.train["weight_decay"]},
            {"params": [p for p in params if p.ndim < 2], "weight_decay": 0.0},
        ]
        return [g for g in groups if g["params"]]

    def optimizer(self, parameters: Iterable[nn.Parameter]) -> Optimizer:
        """Fused AdamW."""
        return AdamW(self.groups(parameters), **ADAMW)

    def set_rate(self, optimizer: Optimizer, step: int) -> None:
        """Linear warm-up, then cosine."""
        rate = learning_rate(
            step,
            peak=self.train["learning_rate"],
            warmup=self.train["warmup_steps"],
            last=self.steps,
            schedule=self.train["schedule"],
        )
        for group in optimizer.param_groups:
            group["lr"] = rate

    @property
    def grad_clip(self) -> float:
        return float(self.train["grad_clip"])


def mean_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Micro-batches are all full, so that the mean of their means is the mean over the global batch's tokens."""
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


class Record:
    """Writes one line per step: when the rank had finished it, and the mean losses of the micro-batches it computed."""

    def __init__(self, folder: str, rank: int) -> None:
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND
        self._file = os.open(Path(folder) / f"steps-{rank}.jsonl", flags, 0o644)

    def __call__(self, step: int, losses: list[Tensor]) -> None:
        now = time.time()
        line = {"step": step, "time": now, "losses": [float(loss.detach()) for loss in losses]}
        os.write(self._file, (json.dumps(line) + "\n").encode())


def one_thread() -> None:
    """As ours: workers share the machine's cores, one thread each."""
    torch.set_num_threads(1)
