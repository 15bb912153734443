"""What a controller is told of its run, and how its workers are started. Values only; imports neither Ray nor torch."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from evenkeel.control.policy import Policy
from evenkeel.core.ids import Version


@dataclass(frozen=True, slots=True)
class WorkerSpec:
    """How a worker of this run is started.

    Attributes:
        folder: of the run, a path or URL.
        make: pickled worker_actor.Make, which builds the worker's job in its own process. Bytes, because it may hold
            the user's code, and needs torch, and the controller has nothing to do with either.
        device: "cpu" or "cuda".
        resources: what one worker takes of Ray, by Ray's names ("CPU", "GPU", and custom ones).
        env_vars: of its process, on top of what Ray's nodes give it.
        tell_spares: tell workers without a place of every step, because a fault is planned for one.
    """

    folder: str
    make: bytes
    device: str
    resources: Mapping[str, float]
    env_vars: Mapping[str, str] = field(default_factory=dict)
    tell_spares: bool = False

    def options(self) -> dict[str, Any]:
        """Arguments of an actor's `.options()`."""
        custom = {k: v for k, v in self.resources.items() if k not in ("CPU", "GPU")}
        return {
            "num_cpus": self.resources.get("CPU", 0),
            "num_gpus": self.resources.get("GPU", 0),
            "resources": custom or None,
            "runtime_env": {"env_vars": dict(self.env_vars)} if self.env_vars else None,
        }


@dataclass(frozen=True, slots=True)
class ControllerFault:
    """A fault planned for the controller itself; `key` names it for RunDirectory.claim_fault.

    Attributes:
        phase: "step": when `step` has become the open one, "recovery": in the first repair from then on, or of
            the first checkpoint from then on "write": all parts are there and the manifest is about to be written, and
            "written": it is there, and the controller has not heard of it.
    """

    key: str
    step: int
    phase: str
    kind: str


@dataclass(frozen=True, slots=True)
class RunSpec:
    """All that a controller needs to run a run, and to take it over.

    Attributes:
        folder: of the run, a path or URL.
        lr: the learning rate of a step, for the metrics.
        orphan_s: without a follower for so long the run is stopped.
        cluster: the Ray cluster that it runs in, for the lease.
        seed: run.seed, for the manifests of checkpoints.
        keep: how many complete checkpoints stay.
        begun: how many journal entries there were when the run was submitted; what they end is not the end of this.
        resume: the version to begin from, as the user asked; None for the newest that there is.
        emulated: fields of the event `emulated`; empty where nothing is.
    """

    name: str
    folder: str
    policy: Policy
    worker: WorkerSpec
    global_batch: int
    lr: Callable[[int], float]
    orphan_s: float
    faults: tuple[ControllerFault, ...] = ()
    cluster: str = ""
    seed: int = 0
    keep: int = 2
    begun: int = 0
    resume: Version | None = None
    emulated: Mapping[str, Any] = field(default_factory=dict)
