"""What a configuration consists of: its sections, their keys and defaults."""

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any, get_type_hints

from evenkeel.config_values import ConfigError, nearest_key

DEFAULTS = "defaults"
STDLIB = "stdlib"
"""As data.path, the sources of this Python's own standard library."""


@dataclass(frozen=True, slots=True)
class RunSection:
    """Identity. `storage_path` is any fsspec URL or local path; `orphan_minutes` without a driver end in a stop."""

    name: str = ""
    storage_path: str = "runs"
    seed: int = 0
    orphan_minutes: float = 30.0


@dataclass(frozen=True, slots=True)
class ModelSection:
    """A registered model or "module:function", and the keys that it alone understands (and checks)."""

    name: str = "decoder"
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class DataSection:
    """A registered dataset or "module:function", its paths, and the keys that it alone understands (and checks)."""

    name: str = "text"
    path: str = STDLIB
    eval_path: str | None = None
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class TrainSection:
    """Batches are counted in samples; global_batch = M x micro_batch. `warmup_steps` and `eval_every` are steps."""

    steps: int = 100
    global_batch: int = 16
    micro_batch: int = 2
    learning_rate: float = 1e-3
    weight_decay: float = 0.1
    warmup_steps: int = 10
    schedule: str = "cosine"
    grad_clip: float = 1.0
    precision: str = "fp32"
    eval_every: int = 0
    max_bad_steps: int = 10

    @property
    def micro_batches(self) -> int:
        """M: how many micro-batches make a step, whatever the layout."""
        return self.global_batch // self.micro_batch


@dataclass(frozen=True, slots=True)
class ScalingSection:
    """`workers` is (fewest, most) in the world; `spares` stand by beside them."""

    workers: list[int] = field(default_factory=lambda: [1, 1])
    spares: int = 0
    use_gpu: bool = False
    resources_per_worker: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class ParallelSection:
    """Degrees. `tensor` is hard, the others are the wish at full strength; None leaves it to the planner. With
    `rebalance` micro-batches and layers move to who does them fastest; without it all workers are taken for equal."""

    data: int | None = None
    pipeline: int | None = None
    tensor: int | None = None
    rebalance: bool = True


@dataclass(frozen=True, slots=True)
class RedundancySection:
    """`copies` of each slice of optimizer state (None: one per pipeline, or as many as fit); steps between mirrors
    (0: none)."""

    copies: int | None = None
    mirror_every: int = 0


@dataclass(frozen=True, slots=True)
class CheckpointSection:
    """`every_steps` 0 is the optimum for the measured cost and failure rate; `max_failures` None is without limit."""

    every_steps: int = 0
    keep: int = 2
    max_failures: int | None = None


@dataclass(frozen=True, slots=True)
class EmulateSection:
    """`slowdown` maps a rank to a factor of at least 1, paid in real time, in the steps `from_step` to `to_step` (None:
    from the first, to the last). The worker that has the rank when the run begins, or goes on, keeps the factor."""

    slowdown: dict[int, float] = field(default_factory=dict)
    from_step: int | None = None
    to_step: int | None = None


@dataclass(frozen=True, slots=True)
class FaultSection:
    """One configured fault; fires once per run. `target` is "rank:N", "stage:S", "spare" or "controller"."""

    step: int
    phase: str
    target: str
    kind: str = "kill"


@dataclass(frozen=True)
class Config:
    """A complete, checked configuration. `sources` tells for each key that was set who set it, by its dotted name."""

    run: RunSection = field(default_factory=RunSection)
    model: ModelSection = field(default_factory=ModelSection)
    data: DataSection = field(default_factory=DataSection)
    train: TrainSection = field(default_factory=TrainSection)
    scaling: ScalingSection = field(default_factory=ScalingSection)
    parallel: ParallelSection = field(default_factory=ParallelSection)
    redundancy: RedundancySection = field(default_factory=RedundancySection)
    checkpoint: CheckpointSection = field(default_factory=CheckpointSection)
    emulate: EmulateSection = field(default_factory=EmulateSection)
    faults: list[FaultSection] = field(default_factory=list)
    sources: dict[str, str] = field(default_factory=dict, compare=False, repr=False)

    def error(self, key: str, problem: str) -> ConfigError:
        """The error to raise for a value of this configuration that makes no sense; names who set the key."""
        return ConfigError(problem, key=key, source=self.source(key))

    def blame(self, error: ConfigError) -> ConfigError:
        """The same error with the source that set its key: models and datasets know the key only."""
        return error if error.source else self.error(error.key, error.problem)

    def unknown(self, key: str, valid: Sequence[str]) -> ConfigError:
        """The error to raise for a key of its own (of section model or data) that a model or dataset does not have.

        `key` and `valid` are dotted names, such as "model.layers".
        """
        return ConfigError(f"unknown key; nearest valid key: {nearest_key(key, valid)}", key, self.source(key))

    def source(self, key: str) -> str:
        """The file that set a key, "command line", or "defaults"."""
        parts = key.split(".")
        for n in range(len(parts), 0, -1):
            if (known := self.sources.get(".".join(parts[:n]))) is not None:
                return known
        below = [v for k, v in self.sources.items() if k.startswith(key + ".")]
        return below[-1] if below else DEFAULTS

    def said_last(self, *keys: str) -> str:
        """Of several keys the one that was set last; the first of them where none was."""
        said = [key for name in self.sources for key in keys if f"{name}.".startswith(f"{key}.")]
        return said[-1] if said else keys[0]

    def fault_keys(self) -> tuple[str, ...]:
        """A name for each fault that stays the same over resumes; equal faults are told apart by a count."""
        names = [f"step{f.step}-{f.phase}-{f.target.replace(':', '')}-{f.kind}" for f in self.faults]
        return tuple(f"{name}-{names[:i].count(name) + 1}" for i, name in enumerate(names))

    def as_mapping(self) -> dict[str, Any]:
        """The whole configuration as load_config would take it, defaults included."""
        sections = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("faults", "sources")}
        mapping = {name: {f.name: getattr(s, f.name) for f in fields(s)} for name, s in sections.items()}
        for name in ("model", "data"):
            mapping[name] |= mapping[name].pop("options")
        return {**mapping, "faults": [{f.name: getattr(fault, f.name) for f in fields(fault)} for fault in self.faults]}


SECTIONS = tuple(f.name for f in fields(Config) if f.name != "sources")


def valid_keys() -> tuple[str, ...]:
    """Every dotted key that exists, the free ones of model and data aside."""
    hints = get_type_hints(Config)
    names = list(SECTIONS)
    for section in SECTIONS:
        if is_dataclass(hints[section]):
            names += [f"{section}.{f.name}" for f in fields(hints[section]) if f.name != "options"]
    return tuple(names)
