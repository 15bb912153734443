"""Storage errors that pass are waited out, with growing pauses, up to a stated time; others are raised at once."""

import random
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from heapq import nlargest
from math import inf
from typing import TypeVar

from evenkeel.store.errors import StoreError
from evenkeel.store.failures import transient

T = TypeVar("T")

LOOK_S = 0.5
"""Between two looks whether somebody has got into a hurry."""

EXCUSED = 3
"""Attempts that may have got on for as long as they like before they failed: the longest of all."""


@dataclass(frozen=True, slots=True)
class Patience:
    """How long a store is waited for, in seconds.

    Attributes:
        total_s: from the first attempt on, without the time for which attempts got on; no attempt begins later.
        first_s: the longest first pause; each following may be twice as long, up to `most_s`.
    """

    total_s: float = 120.0
    first_s: float = 0.5
    most_s: float = 10.0

    def pauses(self, rng: random.Random) -> Iterator[float]:
        """Without end. Each is between half of what it may be and all of it, so that many workers do not come at once.

        "Equal jitter" of Brooker, Exponential Backoff and Jitter (AWS Architecture Blog, 2015).
        """
        longest = self.first_s
        while True:
            longest = min(longest, self.most_s)
            yield longest * rng.uniform(0.5, 1.0)
            longest *= 2


HURRIED = Patience(total_s=30.0)


class Unhurried:
    """Patience without end, until somebody is in a hurry: from then on `hurried`, counted from the first attempt on.

    Its `wait` is for `retrying`: it ends a pause early when that happens, for another attempt.

    Args:
        asked: whether somebody is; looked at every LOOK_S of a pause, by the thread that waits.
    """

    def __init__(self, asked: Callable[[], bool], hurried: Patience = HURRIED) -> None:
        self._asked, self._patience = asked, hurried
        self._hurry = threading.Event()

    @property
    def total_s(self) -> float:
        return self._patience.total_s if self._hurry.is_set() else inf

    def pauses(self, rng: random.Random) -> Iterator[float]:
        return self._patience.pauses(rng)

    def hurry(self) -> None:
        """From any thread."""
        self._hurry.set()

    def wait(self, seconds: float) -> bool:
        """Returns after so many seconds, or as soon as somebody gets into a hurry; never True."""
        if self._hurry.is_set():
            time.sleep(seconds)
            return False
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            if self._asked():
                self.hurry()
            if self._hurry.wait(min(left, LOOK_S)):
                break
        return False


@dataclass(frozen=True, slots=True)
class Trouble:
    """An attempt that failed and will be repeated after `pause_s`; the first began `since_s` ago."""

    error: StoreError
    attempt: int
    since_s: float
    pause_s: float

    @property
    def is_news(self) -> bool:
        """At growing intervals, so that a day of it is some 15 lines: the attempts 1, 2, 4, 8, …"""
        return self.attempt.bit_count() == 1


def retrying(
    call: Callable[[], T],
    report: Callable[[Trouble], None],
    wait: Callable[[float], bool],
    patience: Patience | Unhurried = Patience(),
    clock: Callable[[], float] = time.monotonic,
    passes: Callable[[StoreError], bool] = transient,
    moved_at: Callable[[], float] = lambda: -inf,
) -> T:
    """What `call` returns, which is repeated after errors that pass. It must be such that repeating it does no harm.

    All of Files may be repeated, and a whole `with files.stream(...)`; so may Journal.append.

    Args:
        report: is told each time before a pause.
        wait: returns after so many seconds, or earlier and True to give up: the `wait` of a threading.Event.
        passes: whether to wait for an error to pass.
        moved_at: when the call last got on, by the clock. For as long as an attempt got on the store was not waited
            for; but a few such attempts are enough.

    Raises:
        StoreError: an error that does not pass, or the last one when `wait` gave up, as they were; or one that
            says how long was tried.
    """
    begun = clock()
    well: list[float] = []
    for attempt, pause in enumerate(patience.pauses(random.Random()), start=1):
        started = clock()
        try:
            return call()
        except StoreError as error:
            since = clock() - begun
            if not passes(error):
                raise
            well.append(max(0.0, moved_at() - started))
            if since - sum(nlargest(EXCUSED, well)) + pause > patience.total_s:
                raise StoreError(f"{error} (given up after {attempt} attempts in {since:.0f} s)") from error
            report(Trouble(error, attempt, since, pause))
            if wait(pause):
                raise
    raise AssertionError("pauses have no end")
