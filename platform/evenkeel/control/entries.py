"""The journal: what a controller writes down before anybody hears of it, and what its next life begins from."""

from collections.abc import Iterable
from dataclasses import dataclass
from math import inf

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
    """The run goes back to `base`: all that came after it, up to generation `at`, is gone.

    Attributes:
        loss: nobody alive had what was committed since, nor a mirror of it; so it is made good by a checkpoint alone.
    """

    base: Version
    at: Generation
    reason: str
    loss: bool = False


@dataclass(frozen=True, slots=True)
class RunEnded:
    """The run is over, unless it is submitted again: then the next entry is an EpochBegun."""

    status: str
    error: str


Entry = EpochBegun | WorldOpened | StepSettled | Restored | RunEnded


@dataclass(frozen=True, slots=True)
class Shown:
    """What metrics.jsonl says of earlier lives, beside the journal: of the lines that were not taken back.

    Attributes:
        witness: the last vote (rule 4).
        saving: the last one that says that its step is saved.
        worker_seconds: time that workers worked, within the worlds.
    """

    witness: Vote | None = None
    saving: Vote | None = None
    worker_seconds: float = 0.0

    @classmethod
    def of(cls, newest_first: Iterable[Vote], worker_seconds: float = 0.0) -> "Shown":
        """From the votes of all lines; those that a later one took back are left out."""
        witness: Vote | None = None
        step = inf
        for vote in newest_first:
            witness = vote if witness is None else witness
            if vote.step < step and vote.saves:
                return cls(witness, vote, worker_seconds)
            step = min(step, vote.step)
        return cls(witness, None, worker_seconds)


NOTHING_SHOWN = Shown()
