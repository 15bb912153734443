"""What thousands of workers say alike: taken down as long as nothing follows from it, faster than one by one."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from evenkeel.control import messages as m
from evenkeel.control import progress, repair, saving, watch
from evenkeel.control.modes import Aborting, Forming, Settling
from evenkeel.control.state import State

_WAITING = (Forming, Aborting, Settling)
"""Modes that end when everybody has said something."""
_Take = Callable[[State, float, Iterator[Any]], int]


def _by_each(take: Callable[[State, Any], None]) -> _Take:
    """What everybody is waited for with: nothing follows from it before the last one."""

    def taken(s: State, now: float, events: Iterator[Any]) -> int:
        mode, count = s.mode, 0
        while isinstance(mode, _WAITING) and len(mode.awaited) > 1 and (event := next(events, None)) is not None:
            take(s, event)
            count += 1
        return count

    return taken


_MANY: dict[type, _Take] = {
    m.Joined: _by_each(progress.joined),
    m.Answered: _by_each(repair.answered),
    m.Settled: _by_each(repair.settled),
    m.PartWritten: saving.parts_written,
    m.Located: watch.many_located,
}
"""What each of thousands says, and who takes down the first of it from which nothing follows; returns how many."""


def taken_down(s: State, now: float, events: Sequence[m.Event], first: int) -> int:
    """Takes down what nothing follows from: how many events from `first` on, never the last one of all."""
    take = _MANY.get(type(events[first]))
    return 0 if take is None else take(s, now, _alike(events, first))


def _alike(events: Sequence[m.Event], first: int) -> Iterator[m.Event]:
    """All but the last one of all, from `first` on, up to another kind."""
    kind = type(events[first])
    for i in range(first, len(events) - 1):
        event = events[i]
        if type(event) is not kind:
            return
        yield event
