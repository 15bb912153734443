"""The vote: one small float64 vector, summed over the world in every step, that is also the commit decision."""

from dataclasses import dataclass
from enum import IntEnum, IntFlag
from operator import itemgetter

from evenkeel.core.ids import WorkerId


class Slot(IntEnum):
    """Places in the vector. Every worker adds its part; the sum is what everybody reads."""

    ONES = 0
    """1 from each: equals the world size, or the vote is not complete (rule 2)."""
    STEP = 1
    """The step from each: equals step x world size."""
    GRAD_SQUARES = 2
    """Sum of squares of the summed gradient, each parameter once."""
    TOKENS = 3
    """Valid tokens of the global batch."""
    LOSS = 4
    """Summed (not mean) loss."""
    NONFINITE = 5
    """Workers that met an infinite or undefined loss or gradient; these add nothing to the sums above."""
    PAUSE = 6
    CHECKPOINT = 7
    STOP = 8
    EVAL_TOKENS = 9
    """Of the validation of the version that this step started from; 0 where none was due."""
    EVAL_LOSS = 10
    BUSY = 11
    """Workers that still write their part of a checkpoint; until there are none, nobody copies the next."""
    MIRROR = 12
    MIRRORING = 13
    """Workers whose part of the last mirror is not whole yet; until there are none, nobody begins the next (rule 9)."""


SLOTS = len(Slot)


class Flags(IntFlag):
    """Requests that ride on a vote, so that all workers see them in the same step."""

    NONE = 0
    PAUSE = 1
    CHECKPOINT = 2
    STOP = 4
    MIRROR = 8


_SLOTS = (
    (Flags.PAUSE, Slot.PAUSE),
    (Flags.CHECKPOINT, Slot.CHECKPOINT),
    (Flags.STOP, Slot.STOP),
    (Flags.MIRROR, Slot.MIRROR),
)
_requests = itemgetter(*(slot for _, slot in _SLOTS))
_news = itemgetter(Slot.NONFINITE, Slot.EVAL_TOKENS, *(slot for _, slot in _SLOTS))


def put_flags(ballot: list[float], flags: Flags) -> None:
    """Writes requests into a worker's part of a vote."""
    for flag, slot in _SLOTS:
        ballot[slot] = float(flag in flags)


@dataclass(frozen=True, slots=True)
class Difference:
    """Copies of one part of the state that should be the same and are not.

    Attributes:
        part: its name, such as "layers0-4.tp0".
        sums: each owner with the checksum of its copy.
    """

    part: str
    sums: tuple[tuple[WorkerId, int], ...]


@dataclass(frozen=True, slots=True)
class Timing:
    """What a worker has measured since the last vote that told it; 0 or nothing where there was nothing to measure.

    Attributes:
        pass_s: seconds that one micro-batch's forward and backward pass take in its stage, without waiting for others.
        receive_s: seconds per micro-batch in which messages of neighbouring stages came in, from their first byte on.
        layers: pass_s, divided into the layers of the stage; told by the first TP rank only.
        source: from whom the slowest of its large messages came, and with how many bytes per second.
    """

    worker: WorkerId
    pass_s: float = 0.0
    receive_s: float = 0.0
    layers: tuple[float, ...] = ()
    source: WorkerId | None = None
    bytes_per_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Vote:
    """The completed vote of one step in one generation. `values` are indexed by Slot, all finite.

    Attributes:
        differences: between copies of the version that the step began from, as far as this vote compared them. A vote
            that has any commits nothing, anywhere.
    """

    generation: int
    step: int
    values: tuple[float, ...]
    differences: tuple[Difference, ...] = ()

    def complete(self, world_size: int) -> bool:
        """Whether the guards hold: an aborted all-reduce may claim success with a partial sum (rule 2)."""
        return (
            len(self.values) == SLOTS
            and self.values[Slot.ONES] == world_size
            and self.values[Slot.STEP] == self.step * world_size
        )

    @property
    def flags(self) -> Flags:
        """The requests that are carried out with this step. Those to save, and to save and stop, wait for BUSY, that to
        mirror for MIRRORING."""
        flags = Flags.NONE
        if not any(_requests(self.values)):
            return flags
        for flag, slot in _SLOTS:
            if self.values[slot] > 0:
                flags |= flag
        if self._busy:
            flags &= ~(Flags.CHECKPOINT | Flags.STOP)
        return flags & ~Flags.MIRROR if self.values[Slot.MIRRORING] > 0 else flags

    @property
    def _busy(self) -> bool:
        """Whether somebody still writes its part of a checkpoint."""
        return self.values[Slot.BUSY] > 0

    @property
    def saves(self) -> bool:
        """Whether everybody copies its part of the version that this vote commits, to be written to the store."""
        return self.values[Slot.CHECKPOINT] > 0 and not self._busy

    @property
    def mirrors(self) -> bool:
        """Whether everybody begins to mirror its part of the version that this vote commits. The mirror before it is
        whole everywhere then."""
        return Flags.MIRROR in self.flags

    @property
    def uneventful(self) -> bool:
        """Whether nothing follows from it but its step: no request, no validation, nothing to skip, no difference."""
        return not self.differences and self.weight > 0 and not any(_news(self.values))

    @property
    def leaves(self) -> bool:
        """Whether everybody leaves the generation after this step: to pause, or to stop."""
        return self.values[Slot.PAUSE] > 0 or (self.values[Slot.STOP] > 0 and not self._busy)

    @property
    def skip(self) -> bool:
        """Whether parameters stay as they are (rule 12: a pure function of the vote). The step still counts."""
        return self.values[Slot.NONFINITE] > 0 or self.weight <= 0

    @property
    def weight(self) -> float:
        """What the summed loss and gradients are divided by: valid tokens, or what else the model's loss counts."""
        return self.values[Slot.TOKENS]

    @property
    def tokens(self) -> int:
        return int(self.weight)

    @property
    def loss(self) -> float | None:
        """Mean loss per token; None in a skipped step."""
        return None if self.skip else self.values[Slot.LOSS] / self.weight

    @property
    def grad_norm(self) -> float | None:
        """Euclidean norm of the mean gradient; None in a skipped step."""
        return None if self.skip else float(self.values[Slot.GRAD_SQUARES] ** 0.5 / self.weight)

    @property
    def eval_loss(self) -> float | None:
        tokens = self.values[Slot.EVAL_TOKENS]
        return self.values[Slot.EVAL_LOSS] / tokens if tokens > 0 else None
