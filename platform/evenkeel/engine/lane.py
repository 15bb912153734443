"""Operations of one communicator, one after another in the order in which they were issued."""

import threading
from collections import deque
from collections.abc import Callable

from evenkeel.engine.rendezvous import GroupBroken


class Work:
    """An operation under way."""

    def __init__(self, run: Callable[[], None]) -> None:
        self._run = run
        self._finished = threading.Event()
        self._error: BaseException | None = None

    def wait(self) -> None:
        """Blocks until it is complete. Raises GroupAborted or GroupBroken; what it wrote to is undefined then."""
        self._finished.wait()
        if self._error is not None:
            raise self._error

    def done(self) -> bool:
        """Whether `wait` would return, or raise, at once."""
        return self._finished.is_set()

    def execute(self) -> None:
        try:
            self._run()
        except BaseException as error:  # the border of the lane's thread: wait() raises it in its caller's
            self._error = error
        finally:
            self._finished.set()
            self._run = _nothing  # it holds tensors


def _nothing() -> None:
    pass


class Lane:
    """Runs operations in the caller's thread, or where that is asked for in a thread of its own.

    The thread starts with the first operation that needs it and lives until `close`.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._changed = threading.Condition()
        self._queue: deque[Work] = deque()
        self._busy = False
        self._closed = False
        self._thread: threading.Thread | None = None

    def now(self, run: Callable[[], None]) -> None:
        """Runs it after all that was issued before, and returns when it is complete. Raises what it raises."""
        with self._changed:
            self._changed.wait_for(lambda: not self._queue and not self._busy)
            self._busy = True
        try:
            run()
        finally:
            self._free()

    def later(self, run: Callable[[], None]) -> Work:
        work = Work(run)
        with self._changed:
            if self._closed:
                raise GroupBroken(f"group {self._name} is closed")
            self._queue.append(work)
            if self._thread is None:
                self._thread = threading.Thread(target=self._serve, name=f"evenkeel-{self._name}", daemon=True)
                self._thread.start()
            self._changed.notify_all()
        return work

    def close(self) -> None:
        """Ends the thread after what was issued; break the connections first, or it may wait for a peer."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join()

    def _serve(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: (self._queue and not self._busy) or (self._closed and not self._queue))
                if not self._queue:
                    return
                work = self._queue.popleft()
                self._busy = True
            work.execute()
            self._free()

    def _free(self) -> None:
        with self._changed:
            self._busy = False
            self._changed.notify_all()
