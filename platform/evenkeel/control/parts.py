"""What messages and journal entries are made of."""

from dataclasses import dataclass

from evenkeel.core.ids import Generation, Version
from evenkeel.core.model import Shard
from evenkeel.core.vote import Vote


@dataclass(frozen=True, slots=True)
class Held:
    """A shard in a worker's memory. `version` is None while it is being written: a torn shard has no label (rule 8).

    `mirror` is True for a snapshot, its own or somebody else's, beside what it trains.
    """

    shard: Shard
    version: Version | None
    mirror: bool = False


@dataclass(frozen=True, slots=True, order=True)
class Position:
    """How far a worker's training thread has come; the order is the order of the work."""

    generation: Generation = 0
    step: int = 0
    phase: int = 0
    """Index into PHASES."""
    micro: int = 0
    collective: int = 0
    """Collectives begun in this generation."""
    waiting: bool = False
    """Blocked in communication right now: waiting for others rather than working."""


@dataclass(frozen=True, slots=True)
class Report:
    """A completed vote and the unix second at which the leader had committed it."""

    vote: Vote
    committed_at: float


PHASES = ("parked", "regroup", "reshard", "forward", "backward", "reduce", "vote", "commit", "finish")


@dataclass(frozen=True, slots=True)
class Answer:
    """What a worker says after it has aborted a generation and parked: a promise to commit nothing more of it (rule 1).

    Attributes:
        held: shards in its memory, the current one first; before a generation's first vote earlier ones too (rule 13).
        saw: the completed vote of the open step, if it read one.
        prepared: the version that committing the gradients in hand would make.
        unreported: committed votes that the controller has not acknowledged, oldest first.
    """

    position: Position
    held: tuple[Held, ...] = ()
    saw: Vote | None = None
    prepared: Version | None = None
    unreported: tuple[Report, ...] = ()


@dataclass(frozen=True, slots=True)
class Decision:
    """How the open step of a generation was settled: everybody's state is `base` from now on.

    `vote` is the vote to commit `base` with, for those who hold its gradients and have not committed yet;
    None where nothing was rolled forward.
    """

    generation: Generation
    base: Version
    vote: Vote | None
    reason: str


@dataclass(frozen=True, slots=True)
class Fault:
    """Why training code raised, as far as the worker can say.

    `collective` is True where the error is a broken collective, so that the cause is probably somebody else's death.
    """

    step: int
    phase: str
    micro: int
    layer: str
    error: str
    collective: bool
