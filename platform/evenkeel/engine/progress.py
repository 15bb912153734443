"""Where a training thread is: written by it at every turn, read by control threads at any time."""

from collections.abc import Callable
from types import TracebackType

from evenkeel.control.messages import PHASES, Position

PHASE = {name: index for index, name in enumerate(PHASES)}


class AbortedError(Exception):
    """The generation was aborted: the training thread leaves it. Not a fault."""


class Progress:
    """A position that is cheap to write: plain attributes, one writer.

    A reader may see a micro-batch of the step before for a moment, which does a probe no harm.

    Attributes:
        layer: index of the model's layer whose code runs, -1 outside of any.
    """

    __slots__ = ("_running", "_waiting", "collective", "generation", "layer", "micro", "phase", "step", "waiting")

    def __init__(self) -> None:
        self.generation = 0
        self.step = 0
        self.phase = "parked"
        self.micro = 0
        self.collective = 0
        self.waiting = False
        self.layer = -1
        self._running: Callable[[], bool] = _never
        self._waiting = _Waiting(self)

    def begin(self, generation: int, step: int, running: Callable[[], bool]) -> None:
        """A generation is entered; `running` turns False once it is aborted."""
        self.generation, self.step, self.micro, self.collective, self.layer = generation, step, 0, 0, -1
        self.waiting = False
        self._running = running

    def enter(self, phase: str, micro: int = 0) -> None:
        """Raises AbortedError if the generation is not to go on."""
        self.phase = phase
        self.micro = micro
        self.check()

    def check(self) -> None:
        """Raises AbortedError if the generation is not to go on."""
        if not self._running():
            raise AbortedError

    def moved(self) -> None:
        """Reading or writing much has come a step further: it is slow, not stuck. Raises as `check` does."""
        self.check()
        self.collective += 1

    def communicating(self) -> "_Waiting":
        """A context in which the thread is blocked by others; counts one collective."""
        return self._waiting

    def park(self) -> None:
        self.phase, self.waiting = "parked", False

    def position(self) -> Position:
        return Position(self.generation, self.step, PHASE[self.phase], self.micro, self.collective, self.waiting)


class _Waiting:
    __slots__ = ("_progress",)

    def __init__(self, progress: Progress) -> None:
        self._progress = progress

    def __enter__(self) -> None:
        self._progress.collective += 1
        self._progress.waiting = True

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.waiting = False


def _never() -> bool:
    return False
