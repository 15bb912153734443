"""A virtual clock: callbacks in order of their times, and of their making where times are equal."""

from collections.abc import Callable
from heapq import heappop, heappush


class Clock:
    def __init__(self) -> None:
        self.now = 0.0
        self.events = 0
        self._queue: list[tuple[float, int, Callable[[], None]]] = []
        self._made = 0

    def after(self, delay_s: float, call: Callable[[], None]) -> None:
        self._made += 1
        heappush(self._queue, (self.now + max(0.0, delay_s), self._made, call))

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
