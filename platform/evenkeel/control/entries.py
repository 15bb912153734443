"""The journal: what a controller writes down before anybody hears of it, and what its next life begins from."""

from dataclasses import dataclass

from evenkeel.control.parts import Answer, Decision
from evenkeel.core.ids import Generation, Version, WorkerId
from evenkeel.core.layout import WorkerInfo
from evenkeel.core.vote import Vote
from evenkeel.core.world import World


@dataclass(frozen=True, slots=True)
class EpochBegun:
    """A controller takes the run over; workers refuse lower epochs from now on (rule 10)."""

    epoch: int


@dataclass(frozen=True, slots=True)
class WorldOpened:
    """A generation number is in use; it is never used for a second attempt (rule 15)."""

    world: World
    spares: tuple[WorkerInfo, ...]


@dataclass(frozen=True, slots=True)
class StepSettled:
    """The decision that closes a generation, with the answers it rests on (rules 5 and 6), and who is out for good."""

    decision: Decision
    evidence: dict[str, Answer]
    witness: Vote | None
    lost: tuple[WorkerId, ...]


@dataclass(frozen=True, slots=True)
class Restored:
    """The run goes back to `base`, read from the store: all that came after it, up to generation `at`, is gone."""

    base: Version
    at: Generation
    reason: str


@dataclass(frozen=True, slots=True)
class RunEnded:
    """The run is over, unless it is submitted again: then the next entry is an EpochBegun."""

    status: str
    error: str


Entry = EpochBegun | WorldOpened | StepSettled | Restored | RunEnded
