"""The work that ours and every peer do alike: one configuration that both sides read, and what a run of it gave."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.process import BenchError, CpuSeries

WARM_UP = 10
"""Steps that are not measured: caches, connections, the warm-up of the learning rate."""
SAME_LOSS = 1e-4
"""How far apart, relatively, the losses of a step may be. The order of float32 sums makes less than 1e-6 in 44 steps.
Another batch, initialisation or learning rate is off by far more from the second step on."""


@dataclass(frozen=True, slots=True)
class Work:
    """What to train, how long, and in which arrangement at full strength.

    Attributes:
        model: keys of the configuration's section that are not those of the small decoder.
        batch: global and micro-batch, in samples.
        copies: redundancy.copies.
        save_every: steps between two checkpoints; 0: as the defaults have it, and none in the engine alone.
        rebalance: parallel.rebalance.
        storage: URL of where the run directory goes; "": the folder in which it is trained.
        schedule: of the learning rate. Runs of unequal length are the same work only with "constant".
        slowdown: by rank, how many times as long its passes are made to take; from step `slow_from` on.
    """

    steps: int = 40
    data: int = 1
    pipeline: int = 1
    tensor: int = 1
    spares: int = 0
    fewest: int | None = None
    mirror_every: int = 0
    faults: tuple[Mapping[str, object], ...] = ()
    model: Mapping[str, object] = field(default_factory=dict)
    batch: tuple[int, int] = (16, 2)
    copies: int | None = None
    save_every: int = 0
    rebalance: bool = True
    storage: str = ""
    schedule: str = "cosine"
    slowdown: Mapping[int, float] = field(default_factory=dict)
    slow_from: int | None = None

    @property
    def workers(self) -> int:
        return self.data * self.pipeline * self.tensor

    def config(self, folder: Path) -> dict[str, Any]:
        """As jobs/train.py takes it; everything that decides what is computed is spelt out."""
        return {
            "run": {"name": "run", "storage_path": self.storage or str(folder), "seed": 1234},
            "model": {
                "name": "decoder", "vocab_size": 256, "d_model": 256, "layers": 4, "heads": 4, "kv_heads": 2,
                "seq_len": 128, "dropout": 0.0, "tie_embeddings": False, **self.model,
            },
            "data": {"name": "text", "path": "stdlib"},
            "train": {
                "steps": self.steps, "global_batch": self.batch[0], "micro_batch": self.batch[1], "learning_rate": 3e-4,
                "weight_decay": 0.1, "warmup_steps": 10, "schedule": self.schedule, "grad_clip": 1.0,
                "precision": "fp32", "eval_every": 0,
            },
            "scaling": {"workers": [self.fewest or self.workers, self.workers], "spares": self.spares},
            "parallel": {
                "data": self.data, "pipeline": self.pipeline, "tensor": self.tensor, "rebalance": self.rebalance,
            },
            "redundancy": {"copies": self.copies, "mirror_every": self.mirror_every},
            "checkpoint": {"every_steps": self.save_every},
            "emulate": {"slowdown": dict(self.slowdown), "from_step": self.slow_from},
            "faults": [dict(fault) for fault in self.faults],
        }  # fmt: skip

    def write(self, folder: Path) -> Path:
        """Writes the configuration into the folder (JSON is YAML) and returns its path."""
        path = folder / "work.yaml"
        path.write_text(json.dumps(self.config(folder), indent=1))
        return path


@dataclass(frozen=True, slots=True)
class Steps:
    """What a run gave.

    Attributes:
        began: unix time of the command.
        ends: unix time at which each step was committed.
        losses: mean loss per token of each step.
        cpu: of all processes of the run.
        run: our run directory; None for a peer.
        inside: what was measured inside the processes, by bench/probe.py or a peer; see bench/saved.py.
    """

    began: float
    ends: Mapping[int, float]
    losses: Mapping[int, float]
    cpu: CpuSeries = field(default_factory=CpuSeries)
    run: Path | None = None
    inside: tuple[Mapping[str, Any], ...] = ()

    @property
    def last(self) -> int:
        return max(self.ends)

    @property
    def step_s(self) -> float:
        """Seconds per step after the warm-up, over the whole stretch: a stall counts."""
        return (self.ends[self.last] - self.ends[WARM_UP]) / (self.last - WARM_UP)

    @property
    def cpu_s(self) -> float | None:
        """CPU seconds per step, of all processes, in the same stretch."""
        used = self.cpu.own_between(self.ends[WARM_UP], self.ends[self.last])
        return None if used is None else used / (self.last - WARM_UP)

    @property
    def foreign_cores(self) -> float | None:
        return self.cpu.foreign_cores(self.ends[WARM_UP], self.ends[self.last])

    @property
    def first_step_s(self) -> float:
        """From the command to the first committed step."""
        return self.ends[1] - self.began


def check_complete(steps: Steps, work: Work, who: str) -> None:
    """Raises BenchError unless every step was committed and has a loss."""
    wanted = set(range(1, work.steps + 1))
    for what, found in (("time", steps.ends), ("loss", steps.losses)):
        if set(found) != wanted:
            missing = sorted(wanted - set(found))
            raise BenchError(f"{who} left no {what} of {len(missing)} steps, the first of them {missing[:1]}")


def check_same_work(ours: Steps, theirs: Steps, who: str) -> float:
    """The largest relative difference of losses; BenchError if it is more than the order of sums explains."""
    common = ours.losses.keys() & theirs.losses.keys()
    if not common:
        raise BenchError(f"{who} and ours have no step in common")
    step = max(common, key=lambda s: _apart(ours.losses[s], theirs.losses[s]))
    apart = _apart(ours.losses[step], theirs.losses[step])
    if not apart <= SAME_LOSS:
        raise BenchError(f"not the same work: step {step} has loss {ours.losses[step]}, of {who} {theirs.losses[step]}")
    return apart


def _apart(a: float, b: float) -> float:
    return abs(a - b) / max(abs(a), abs(b))
