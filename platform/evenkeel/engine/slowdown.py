"""Emulation of slow devices: a worker that takes several times as long for its passes as its device does.

What it wastes is spent by computing, not by sleeping: who sleeps leaves its core to the others, who would be the faster
for it, and where the machine is busy it would be slowed by less than a worker that has to compete for its core. And it
is counted in processor time of the training thread: waiting, for messages of others or for a core, is no work, and
waiting for somebody slow is not to make one slower again.
"""

import time

import torch

from evenkeel.core.ids import WorkerId
from evenkeel.core.world import World
from evenkeel.engine.job import Settings

SIDE = 64
"""Of the square matrices that are multiplied: some 20 us at a time, in which other threads of the process may run."""


class Slowdown:
    """Makes passes take `factor` times as long, in the steps `first` to `last` (None: to the end).

    On a GPU a pass is timed by the clock, and waited for by it, with what it waits for in its TP group.
    """

    def __init__(
        self,
        factor: float = 1.0,
        first: int = 1,
        last: int | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        self.factor, self._first, self._last = factor, first, last
        self._device = torch.device(device)
        self._clock = time.perf_counter if self._device.type == "cuda" else time.thread_time
        self._owed = 0.0
        self._matrix = torch.ones(SIDE, SIDE)
        self._product = torch.empty(SIDE, SIDE)

    def begin(self) -> float:
        """To be called before a pass, which gives `end` what it returns."""
        return self._clock()

    def end(self, began: float, step: int) -> None:
        """Returns when a pass of this step that has just come to its end has taken its time.

        What was burned too much is taken off the next one.
        """
        if self.factor <= 1.0 or step < self._first or (self._last is not None and step > self._last):
            return
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        now = self._clock()
        self._owed += (self.factor - 1.0) * (now - began)
        until = now + self._owed
        while now < until:
            torch.mm(self._matrix, self._matrix, out=self._product)
            now = self._clock()
        self._owed = until - now


def slowdown_for(me: WorkerId, world: World, settings: Settings, device: torch.device) -> Slowdown:
    """Of a worker, for all its life, by the first world that gives it a place.

    The slow ones are those who have the named ranks when a run begins, or goes on from a checkpoint: worlds that nobody
    brings state into. They stay slow at whatever rank a later world puts them, as a slow GPU does, and who joins later,
    also in the place of one of them, is as fast as it is.
    """
    factor = 1.0 if world.sources else settings.slowdown.get(world.layout.places[me].rank, 1.0)
    return Slowdown(factor, settings.slow_from, settings.slow_to, device)
