"""The steps of one world, known from when they begin: none is simulated by itself."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from math import ceil

from evenkeel.control.liveness import STEPS_REMEMBERED
from evenkeel.control.speeds import SAMPLES
from evenkeel.core.vote import SLOTS, Flags, Slot, Vote, put_flags
from evenkeel.core.world import World
from evenkeel.plan import timing

MOST = 100_000
"""Steps that are told at once."""
SLACK = 1e-9
"""Of a step: so that a commit at this very second has happened, whatever sums of floats make of it."""


@dataclass
class Training:
    """A world that trains.

    Attributes:
        step: the last one that was committed.
        resumes_at: when the next one begins to be computed: after `held_by`, which held the training up since then.
        held_by: what did, and until when, in order: parts of a checkpoint, or of the beginning of a world.
        fresh: how many of the next steps are to be told one by one, as the controller does not know yet how long they
            take.
        pending: requests for the next votes (rule 16).
        mirrored_at: the step of the last mirror.
        told: how often in a row what workers measure was told, since it last mattered.
        halted: somebody died, or the world has left: no step will be committed any more.
    """

    world: World
    step_s: float
    tokens: float
    step: int
    resumes_at: float
    held_by: list[tuple[str, float]] = field(default_factory=list)
    fresh: int = STEPS_REMEMBERED
    pending: Flags = Flags.NONE
    mirrored_at: int = 0
    told: int = 0
    halted: bool = False

    def __post_init__(self) -> None:
        self.mirrored_at = self.step

    def commits_at(self, step: int) -> float:
        return self.resumes_at + (step - self.step) * self.step_s

    def committed_by(self, now: float) -> int:
        """The last step that is committed by now."""
        if self.halted or now < self.resumes_at:
            return self.step
        return self.step + int((now - self.resumes_at) / self.step_s + SLACK)

    def next_vote(self, busy_until: float, mirroring_until: float, asked_after: int | None, weighs: bool) -> int:
        """The next step whose report matters at its very time: as its vote asks for something, or the controller may.

        Args:
            busy_until: until when somebody writes a part of a checkpoint (BUSY).
            mirroring_until: until when the last mirror is not whole.
            asked_after: the step after which the controller will ask for a checkpoint.
            weighs: whether it looks for how long the work would be better shared out in another way.
        """
        following = self.step + 1
        if self.fresh or self.pending & Flags.PAUSE:
            return following
        found = [self._checkpoint_at(busy_until), self._mirror_at(mirroring_until), following + MOST]
        found.append(self._measured_at(weighs))
        if asked_after is not None and not self.pending:
            found.append(max(following, asked_after))
        return min(step for step in found if step is not None)

    def flags(self, step: int, busy_until: float, mirroring_until: float) -> Flags:
        """What the vote of the next step says that is taken."""
        flags = self.pending & Flags.PAUSE
        if self._checkpoint_at(busy_until) == step:
            flags |= Flags.CHECKPOINT
        if self._mirror_at(mirroring_until) == step:
            flags |= Flags.MIRROR
        return flags

    def votes(self, last: int, flags: Flags) -> list[Vote]:
        """Of the steps up to `last`, with these flags in the last one."""
        generation, size = self.world.generation, self.world.size
        plain = _values(size, self.tokens, Flags.NONE)
        votes = [Vote(generation, step, plain) for step in range(self.step + 1, last)]
        return [*votes, Vote(generation, last, _values(size, self.tokens, flags))]

    def advance(self, step: int, flags: Flags) -> None:
        """This step is committed, with these flags in its vote."""
        self.resumes_at, self.held_by = self.commits_at(step), []
        every = self.world.checkpoint_every
        if every and step // every > self.step // every:
            self.pending |= Flags.CHECKPOINT
        self.pending &= ~flags
        self.step = step
        self.fresh = max(0, self.fresh - 1)
        self.told += timing.due(self.world, step)
        if flags & Flags.MIRROR:
            self.mirrored_at = step
        if flags & Flags.PAUSE:
            self.halted = True

    def hold(self, held_by: Sequence[tuple[str, float]]) -> None:
        """The next step begins later: what holds it up, with its seconds, one after the other."""
        for cause, seconds in held_by:
            self.resumes_at += seconds
            self.held_by.append((cause, self.resumes_at))
        if held_by:
            self.fresh = max(self.fresh, 1)

    def ask(self, flags: Flags) -> None:
        """Puts requests on the next votes; for a checkpoint only where there is a store (Member.flags)."""
        self.pending |= flags if self.world.checkpoint_every is not None else flags & ~Flags.CHECKPOINT

    def _checkpoint_at(self, busy_until: float) -> int | None:
        every = self.world.checkpoint_every
        if every is None:
            return None
        if self.pending & Flags.CHECKPOINT:
            return self._not_before(self.step + 1, busy_until)
        return self._not_before((self.step // every + 1) * every, busy_until) if every else None

    def _mirror_at(self, mirroring_until: float) -> int | None:
        every = self.world.mirror_every
        if every is None:
            return None
        return self._not_before(max(self.step + 1, self.mirrored_at + every), mirroring_until)

    def _measured_at(self, weighs: bool) -> int | None:
        """Workers are as fast as they were: once an average is made of what they told, nothing more is to be heard."""
        every = self.world.measure_every
        if weighs:
            self.told = 0
        if every is None or self.told >= SAMPLES:
            return None
        first = (self.step // every + 1) * every
        return first if timing.due(self.world, first) else first + every

    def _not_before(self, step: int, at: float) -> int:
        """This step, or the first one whose vote is at that time or later."""
        return max(step, self.step + ceil((at - self.resumes_at) / self.step_s - SLACK))


@lru_cache(maxsize=4096)
def _values(size: int, tokens: float, flags: Flags) -> tuple[float, ...]:
    """All votes of a world are alike. They lack the step, by which only members check them."""
    values = [0.0] * SLOTS
    values[Slot.ONES] = size
    values[Slot.TOKENS] = values[Slot.LOSS] = tokens
    put_flags(values, flags)
    return tuple(values)
