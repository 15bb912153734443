"""Requests to stop this process: SIGTERM and Ctrl-C. Imports nothing that takes time: this is in place before all else.

Python runs a handler between any two instructions of the main thread. What is raised there may be caught by anybody, or
break off what must not be; so a handler here ends the process, where nothing was started yet, or takes a note.
"""

import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any

STOPPED = 143
SIGNALS = (signal.SIGTERM, signal.SIGINT)
LOOK_S = 0.05


class Stopped(Exception):  # noqa: N818 - it is no error
    """A request to stop came before there was a run to be stopped."""

    def __init__(self, number: int) -> None:
        super().__init__(f"stopped on request ({signal.Signals(number).name})")


def exit_on_request() -> None:
    """From now on a request ends this process with one line and STOPPED, for as long as it has started nothing."""

    def handle(number: int, _: FrameType | None) -> None:
        os.write(sys.stderr.fileno(), f"evenkeel: {Stopped(number)}\n".encode())
        os._exit(STOPPED)

    for number in SIGNALS:
        signal.signal(number, handle)


class StopRequests:
    """Takes note of requests while the block lasts. Signals are the main thread's: in others nothing is noted."""

    def __init__(self) -> None:
        self._noted: list[int] = []
        self._put: Callable[[int], None] = self._noted.append
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "StopRequests":
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._handle) for number in SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, _: FrameType | None) -> None:
        self._put(number)

    def check(self) -> None:
        """Raises Stopped if there was a request."""
        if self._noted:
            raise Stopped(self._noted[0])

    def wait(self, seconds: float) -> bool:
        """Returns after so many seconds, or True as soon as there was a request."""
        end = time.monotonic() + seconds
        while not self._noted and (left := end - time.monotonic()) > 0:
            time.sleep(min(LOOK_S, left))
        return bool(self._noted)

    def pass_on(self, put: Callable[[int], None]) -> None:
        """Hands every request to `put` from now on, those before too. It is called in a handler: see SimpleQueue."""
        self._put = put
        for number in self._noted:
            put(number)
