"""A virtual clock: callbacks in order of their times, and of their making where times are equal."""

from collections.abc import Callable
from heapq import heappop, heappush
from math import inf


class Clock:
    def __init__(self) -> None:
        self.now = 0.0
        self.events = 0
        self._queue: list[tuple[float, int, Callable[[], object]]] = []
        self._made = 0

    def after(self, delay_s: float, call: Callable[[], object]) -> None:
        self.at(self.now + max(0.0, delay_s), call)

    def at(self, second: float, call: Callable[[], object]) -> None:
        """At this very second, or now if that is past."""
        self._made += 1
        heappush(self._queue, (max(self.now, second), self._made, call))

    @property
    def next_at(self) -> float:
        """When the next callback is due; never if there is none."""
        return self._queue[0][0] if self._queue else inf

    @property
    def pending(self) -> int:
        return len(self._queue)

    def advance(self) -> bool:
        """Runs the next callback; False if there is none."""
        if not self._queue:
            return False
        self.now, _, call = heappop(self._queue)
        self.events += 1
        call()
        return True
