"""A tiny job for the engine's tests: a small decoder on made-up text, the same in every process."""

import threading
import time
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from reference import train
from safetensors.torch import load_file, save_file
from torch import Tensor

from evenkeel.core.ids import WorkerId
from evenkeel.core.layout import Layout, Pipeline, Stage
from evenkeel.data.dataset import TensorDataset
from evenkeel.engine.faults import FaultPlan, once_in
from evenkeel.engine.job import FinalTensors, Job, Settings
from evenkeel.engine.mirror import Mirrors
from evenkeel.engine.model import Model
from evenkeel.engine.state import PRECISIONS
from evenkeel.engine.step import rate_of
from evenkeel.models.registry import load_model
from evenkeel.plan.samples import sample_indices

SAMPLES, SEQ, VOCAB = 50, 8, 24
GATE, WHOLE = 100, 200


@dataclass(frozen=True)
class Tiny:
    """Makes jobs, in any process. Four micro-batches of two samples a step.

    Attributes:
        folder: for the final model and the markers of faults.
        blocks: of the decoder; its depth is two more.
    """

    folder: Path
    precision: str = "fp64"
    steps: int = 20
    blocks: int = 2
    tied: bool = False
    dropout: float = 0.2
    faults: tuple[FaultPlan, ...] = ()
    settings: dict[str, Any] = field(default_factory=dict)

    def __call__(self, _: WorkerId) -> Job:
        return Job(
            model=self.model(),
            train=TensorDataset(*tokens(0)),
            eval=TensorDataset(*tokens(1)),
            settings=self.make_settings(),
            write_final=self.write_final,
            fault_once=self.fault_once,
        )

    def model(self) -> Model:
        keys = {
            "vocab_size": VOCAB, "d_model": 16, "layers": self.blocks, "heads": 4, "kv_heads": 2, "d_ff": 24,
            "seq_len": SEQ, "dropout": self.dropout, "tie_embeddings": self.tied,
        }  # fmt: skip
        return load_model("decoder", keys)

    def make_settings(self) -> Settings:
        values: dict[str, Any] = {
            "seed": 7, "last_step": self.steps, "global_batch": 8, "micro_batch": 2, "learning_rate": 1e-2,
            "weight_decay": 0.1, "warmup_steps": 5, "grad_clip": 1.0, "precision": self.precision,
            "faults": self.faults, "eval_batches": 3,
        }  # fmt: skip
        return Settings(**(values | self.settings))

    def fault_once(self, index: int) -> bool:
        """One of GATE or above is a gate instead: its target waits there until `open_gate` is called.

        One of WHOLE or above holds its target until the last mirror has come to an end.
        """
        if index >= WHOLE:
            wait_for_mirrors()
            return False
        if index < GATE:
            return once_in(self.folder)(index)
        wait_for_file(self.folder / "open")
        return False

    def open_gate(self) -> None:
        (self.folder / "open").touch()

    def write_final(self, final: FinalTensors) -> None:
        save_file(dict(final.tensors), self.folder / "final.safetensors")

    def final(self) -> dict[str, Tensor]:
        return load_file(self.folder / "final.safetensors")

    def reference(self) -> tuple[list[float], dict[str, Tensor]]:
        """What the plain loop gives for this job."""
        s = self.make_settings()
        orders = [
            [
                list(
                    sample_indices(
                        s.seed, step, micro, micro_batch=s.micro_batch, global_batch=s.global_batch,
                        dataset_size=SAMPLES,
                    )
                )
                for micro in range(s.micro_batches)
            ]
            for step in range(1, s.last_step + 1)
        ]  # fmt: skip
        return train(
            self.model(), *tokens(0), orders, seed=s.seed, dtype=PRECISIONS[s.precision],
            rates=[rate_of(s, step) for step in range(1, s.last_step + 1)], weight_decay=s.weight_decay,
            betas=s.betas, eps=s.eps, clip=s.grad_clip,
        )  # fmt: skip


def wait_for_file(path: Path) -> None:
    """Until another process has made it."""
    while not path.exists():
        time.sleep(0.002)


def mirrors_here() -> Mirrors:
    """Of the worker that this process is."""
    threads: list[Any] = threading.enumerate()
    mirrors: Mirrors = next(thread._target.__self__._mirrors for thread in threads if thread.name == "train")
    return mirrors


def wait_for_mirrors() -> None:
    """In a worker: until nothing is sent or received any more, so that all that it was to receive is whole."""
    mirrors_here().wait()


def tokens(seed: int) -> tuple[Tensor, Tensor]:
    """Inputs and targets (SAMPLES, SEQ), with some targets that do not count."""
    generator = torch.Generator().manual_seed(seed)
    text = torch.randint(0, VOCAB, (SAMPLES, SEQ + 1), generator=generator)
    targets = text[:, 1:].clone()
    targets[torch.rand(targets.shape, generator=generator) < 0.1] = -100
    return text[:, :-1].contiguous(), targets


def layout_of(workers: list[WorkerId], cuts: list[list[int]], tensor: int, shares: list[int]) -> Layout:
    """A layout of pipelines with stages that begin at the given layers; the last number of each cut is the depth."""
    ids = iter(workers)
    pipelines: list[Pipeline] = []
    micro = 0
    for cut, share in zip(cuts, shares, strict=True):
        stages = tuple(
            Stage(start, stop, tuple(next(ids) for _ in range(tensor)))
            for start, stop in pairwise(cut)
        )
        pipelines.append(Pipeline(stages, micro, micro + share))
        micro += share
    return Layout(tuple(pipelines))


def difference(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    """The largest relative distance of a tensor, by norm."""
    assert ours.keys() == theirs.keys()
    return max(float((ours[n] - theirs[n]).norm() / theirs[n].norm().clamp_min(1e-30)) for n in ours)
