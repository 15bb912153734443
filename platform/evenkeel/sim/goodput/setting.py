"""What is simulated, and what comes out."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import inf, isfinite
from typing import Protocol

from evenkeel.control.policy import Policy
from evenkeel.core.layout import Layout
from evenkeel.core.model import ModelShape
from evenkeel.plan.layout import Wish
from evenkeel.sim.goodput.costs import Costs

NO_LAST_STEP = 10**12

CAUSES = ("productive", "degraded", "detect", "rebuild", "redo", "checkpoint", "starved", "other")
"""Where time goes. Together they are all of the time.

- productive: steps that stay committed, at the pace of full strength.
- degraded: what such steps took longer, because there were too few workers for full strength.
- detect: from a death to the controller that stops the world.
- rebuild: from there to a world that trains, and what its first step takes longer than the others.
- redo: steps that were taken back or never committed.
- checkpoint: for how long checkpoints and mirrors held up the training.
- starved: too few workers for any world.
- other: the first start; and all that is left once the run has ended by itself.
"""


@dataclass(frozen=True, slots=True)
class Change:
    """A node comes (`there`) or goes, at this second of the run. One that comes back is as good as a new one."""

    at_s: float
    node: str
    there: bool


class Failures(Protocol):
    """A failure model: when nodes go, and come back."""

    def changes(self, nodes: Sequence[str], seed: int, until_s: float) -> Iterator[Change]:
        """In order of time, up to `until_s`; the same for the same seed. `nodes` are there at the beginning."""
        ...


@dataclass(frozen=True, slots=True)
class Never:
    """No node ever fails."""

    def changes(self, nodes: Sequence[str], seed: int, until_s: float) -> Iterator[Change]:
        return iter(())


@dataclass(frozen=True)
class Setting:
    """One simulated run. A worker has one device; `data`, `pipeline` and `tensor` are the degrees at full strength.

    Attributes:
        nodes: there at the beginning. More than full strength and `spares` need stand by without workers on them.
        step_s: seconds of a step at full strength.
        tokens_per_step: of the global batch.
        min_workers: with fewer the run waits.
        spares: nodes' worth of workers that are to stand by, ready.
        copies: how many workers keep each element of the state; None: every pipeline.
        mirror_every: steps between two mirrors; 0: none are kept.
        checkpoint_every: steps between two checkpoints; 0: the controller's optimum; None: none are written.
        per_node: one message for all workers of a TP group, which live and die with their node; else one for each.
        price_per_device_hour: of each device of each node that is there.
        kinds: of device, by node; empty: all are alike. The first nodes are those of full strength.
        slower: by kind, how many times as long as the fastest it takes for the same work. The controller does not know
            it: it hears what workers measure, and shares the work out by that.
        pace: seconds of a step in a layout, whose workers are TP groups if `per_node`; None: `step_s`, longer by as
            much as the slowest pipeline is.

    Raises:
        ValueError: if a number makes no sense.
    """

    nodes: tuple[str, ...]
    devices_per_node: int
    model: ModelShape
    data: int
    pipeline: int
    tensor: int
    micro_batches: int
    step_s: float
    tokens_per_step: float
    duration_s: float
    failures: Failures = field(default_factory=Never)
    costs: Costs = field(default_factory=Costs)
    min_workers: int = 1
    spares: int = 0
    copies: int | None = None
    mirror_every: int = 0
    checkpoint_every: int | None = 0
    per_node: bool = True
    price_per_device_hour: float = 0.0
    seed: int = 0
    kinds: Mapping[str, str] = field(default_factory=dict)
    slower: Mapping[str, float] = field(default_factory=dict)
    pace: Callable[[Layout], float] | None = None

    def __post_init__(self) -> None:
        for name in ("devices_per_node", "data", "pipeline", "tensor", "micro_batches", "min_workers"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        for name in ("step_s", "tokens_per_step", "duration_s"):
            if not (isfinite(getattr(self, name)) and getattr(self, name) > 0):
                raise ValueError(f"{name} is {getattr(self, name)}; it must be above 0, and finite")
        for name in ("spares", "mirror_every", "price_per_device_hour"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be 0 or more")
        if self.checkpoint_every is not None and self.checkpoint_every < 0:
            raise ValueError(f"checkpoint_every is {self.checkpoint_every}; it must be 0 or more, or none")
        if self.copies is not None and self.copies < 1:
            raise ValueError(f"copies is {self.copies}; it must be at least 1, or none for all")
        if self.devices_per_node < self.tensor:
            few = f"a node has {self.devices_per_node} devices"
            raise ValueError(f"tensor is {self.tensor}, but {few}; a TP group lies within a node")
        if self.model.tensor_divides % self.tensor:
            raise ValueError(f"tensor is {self.tensor}; it must divide the model's {self.model.tensor_divides}")
        if self.slower and not {self.kinds.get(node) for node in self.nodes} <= self.slower.keys():
            raise ValueError("slower: says nothing of the kind of some node")
        for kind, times in self.slower.items():
            if not 1 <= times < inf:
                raise ValueError(f"slower: {kind} takes {times} times as long as the fastest; it must be at least 1")
        if self.min_workers > self.workers:
            raise ValueError(f"min_workers is {self.min_workers}, but full strength is {self.workers} workers")

    @property
    def workers(self) -> int:
        """At full strength."""
        return self.data * self.pipeline * self.tensor

    @property
    def folded(self) -> int:
        """How many devices one worker of the controller stands for."""
        return self.tensor if self.per_node else 1

    @property
    def slots(self) -> int:
        """How many workers of the controller a node has room for."""
        return self.devices_per_node // self.folded

    @property
    def policy(self) -> Policy:
        """What the controller is asked for."""
        places, fewest = self.workers // self.folded, -(-self.min_workers // self.folded)
        return Policy(
            model=self.model,
            wish=Wish(self.data, self.pipeline, self.tensor // self.folded, fewest, places),
            micro_batches=self.micro_batches,
            last_step=NO_LAST_STEP,
            spares=self.spares * self.slots,
            copies=self.copies,
            mirror_every=self.mirror_every,
            checkpoint_every=self.checkpoint_every,
            rebalance=bool(self.slower),
        )


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of it.

    Attributes:
        seconds: by cause, in the order of CAUSES; they add up to the duration.
        steps: that are committed at the end.
        tokens: of these steps.
        device_seconds: of all devices that were there.
        cost: of these.
        incidents: disturbances that were repaired, planned pauses not counted.
        restores: how often the run went back, by "mirror", "checkpoint" or "beginning".
        events: that the controller heard.
        messages: between the controller and workers, both ways.
        decisions: what the controller decided, each with its second.
        ended: why the run ended before its time; "" if it did not.
    """

    duration_s: float
    seconds: dict[str, float]
    steps: int
    tokens: float
    device_seconds: float
    cost: float
    incidents: int
    restores: dict[str, int]
    events: int
    messages: int
    decisions: tuple[tuple[float, str], ...]
    ended: str = ""

    @property
    def goodput(self) -> float:
        """The productive part of the time, 0 to 1."""
        return self.seconds["productive"] / self.duration_s

    @property
    def cost_per_token(self) -> float | None:
        """None where no step was committed."""
        return self.cost / self.tokens if self.tokens else None
