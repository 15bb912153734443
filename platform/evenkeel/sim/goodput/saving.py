"""Checkpoints: parts that are written beside the training, and the store that keeps the newest."""

from collections.abc import Callable, Sequence

from evenkeel.control import messages as m
from evenkeel.core.ids import Version, WorkerId
from evenkeel.sim.clock import Clock
from evenkeel.sim.goodput.costs import Costs
from evenkeel.sim.goodput.fleet import Fleet, Hear

KEPT = 2
"""Checkpoints that stay in the store, and the newest whose copies are known to be equal."""
NEWS_S = 60.0
"""Between two words of a worker whose part takes long."""


class Saving:
    """Every member takes equally long for its part; one that dies before it is done has written nothing.

    Attributes:
        copying_until: until when the last copy of the state holds the training up.
        busy_until: until when it is being written.
    """

    def __init__(self, clock: Clock, fleet: Fleet, costs: Costs, state_bytes: int, hear: Hear) -> None:
        self._clock = clock
        self._fleet = fleet
        self._costs = costs
        self._bytes = state_bytes
        self._hear = hear
        self.copying_until = self.busy_until = 0.0

    def begin(self, version: Version, members: Sequence[WorkerId]) -> None:
        """This version is committed, and every member copies its part."""
        self.copying_until = self._clock.now + self._costs.save_stall_s
        self.busy_until = self.copying_until + self._costs.save_write_s
        self._clock.at(self.busy_until, self._written(version, members))
        if self._clock.now + NEWS_S < self.busy_until:
            self._clock.after(NEWS_S, self._at_it(version, members, self.busy_until))

    def _written(self, version: Version, members: Sequence[WorkerId]) -> Callable[[], None]:
        def written() -> None:
            stall_s, alive = self._costs.save_stall_s, self._fleet.alive
            self._hear([m.PartWritten(w, version, "", stall_s) for w in members if w in alive])

        return written

    def _at_it(self, version: Version, members: Sequence[WorkerId], until: float) -> Callable[[], None]:
        def at_it() -> None:
            writer = next((w for w in members if w in self._fleet.alive), None)
            if writer is not None and self._clock.now < until:
                self._hear([m.StillWriting(writer, version)])
                self._clock.after(NEWS_S, at_it)

        return at_it

    def commit(self, command: m.CommitCheckpoint) -> None:
        """Writes the manifest, and removes older checkpoints (store/cleanup)."""
        newest_first = sorted({command.version, *command.line}, key=lambda v: (v.generation, v.step), reverse=True)
        removed = tuple(v.step for v in newest_first[KEPT:] if v != command.agreed)
        done = m.CheckpointCommitted(command.version, self._bytes, removed)
        self._clock.after(0.0, lambda: self._hear([done]))
