"""When silence is too long, and who is to blame: pure bookkeeping of times that the controller is given.

There are no timeouts to tune: limits follow from the measured time of a step. Silence leads to a probe, in every mode
in which workers are waited for. What becomes of who is waited for:

- It does not answer: it is hung (SIGSTOP, a dead host), and killed after about a second (PROBE_S, twice).
- It answers, but does not move while others wait, or does not park: it may be reading from a slow disk, or compiling.
  It is killed after `stuck_s`, if others hold all that it holds.
- It answers, and nobody waits for it, or it is the last to hold some of the state, or it is writing (a commit, the
  final model): to kill it may cost the run, so that takes `patience_s`. A deadlock in its code ends then, in a
  restore or an error.
- Everybody waits for everybody: the link is to blame, and the world is rebuilt without killing; only a repeat evicts.
"""

from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from statistics import median

from evenkeel.control.messages import Position
from evenkeel.core.ids import WorkerId

SILENCE_S = 1.0
"""Before the first probe, on top of two steps."""
PROBE_S = 0.5
"""For the answer to a probe, which comes from a thread that does nothing else; asked twice."""
JOINING_PROBE_S = 2.5
"""The same while joining or in a first step: building models and contexts can hold the interpreter for seconds."""
STUCK_S = 30.0
"""Without a move, for a worker that answers and that others can replace; at least STUCK_STEPS steps."""
STUCK_STEPS = 10
FIRST_STEP_S = 300.0
"""The same until the first step is committed, because it may compile."""
PATIENCE_S = 600.0
"""The same for a worker that nobody can replace, or waits for; at least PATIENCE_STEPS steps."""
PATIENCE_STEPS = 30
STEPS_REMEMBERED = 32
MAX_STRIKES = 4
"""A limit doubles after a kill that brought no progress, but not for ever."""


@dataclass
class Liveness:
    """Limits in seconds. Each of the `strikes` since the last progress doubles them."""

    strikes: int = 0
    progress_at: float = 0.0
    quiet_since: float = 0.0
    """Since when nothing was heard; a probe is due some time after."""
    first: bool = True
    steps_s: deque[float] = field(default_factory=lambda: deque(maxlen=STEPS_REMEMBERED))
    probe: int = 0
    asked: frozenset[WorkerId] = frozenset()
    asked_at: float | None = None
    tries: int = 0
    found: dict[WorkerId, Position] = field(default_factory=dict)
    before: dict[WorkerId, Position] = field(default_factory=dict)
    """Positions at the last complete probe."""
    complete_at: float = 0.0
    unmoved_since: float | None = None

    def strike(self) -> None:
        """Somebody was killed for being silent: perhaps the limit was at fault."""
        self.strikes = min(MAX_STRIKES, self.strikes + 1)

    def begin(self, now: float) -> None:
        """A world is being formed."""
        self.first = True
        self._moved(now)

    def committed(self, now: float) -> None:
        """A step was committed."""
        if not self.first:
            self.steps_s.append(now - self.progress_at)
        self.first = False
        self.strikes = 0
        self._moved(now)

    def _moved(self, now: float) -> None:
        self.progress_at = now
        self._listen(now)

    def parking(self, now: float) -> None:
        """Everybody is asked to park, or to carry out a decision."""
        self._listen(now)

    def _listen(self, now: float) -> None:
        self.quiet_since = now
        self.asked_at = None
        self.found, self.before = {}, {}
        self.unmoved_since = None

    @property
    def step_s(self) -> float:
        """The usual seconds of a step; 0 while none is known."""
        return median(self.steps_s) if self.steps_s else 0.0

    @property
    def silence_s(self) -> float:
        return float((SILENCE_S + 2 * self.step_s) * 2**self.strikes)

    @property
    def probe_s(self) -> float:
        return float((JOINING_PROBE_S if self.first else PROBE_S) * 2**self.strikes)

    @property
    def stuck_s(self) -> float:
        """To move, or to park, for a worker that answers and that others can replace."""
        least = FIRST_STEP_S if self.first else STUCK_S
        return float(min(self.patience_s, max(least, STUCK_STEPS * self.step_s) * 2**self.strikes))

    @property
    def patience_s(self) -> float:
        """The same for one that nobody can replace, or waits for. Does not double: it is the longest."""
        return max(PATIENCE_S, PATIENCE_STEPS * self.step_s)

    def next_check(self) -> float:
        """When `due`, `unanswered` or `stuck` may have something new to say."""
        if self.asked_at is not None:
            return self.asked_at + self.probe_s
        if self.unmoved_since is not None:
            return max(self.quiet_since, self.complete_at) + self.silence_s
        return self.quiet_since + self.silence_s

    def due(self, now: float) -> bool:
        """Whether it is time to ask everybody where they are."""
        return self.asked_at is None and now >= self.next_check()

    def ask(self, now: float, members: Iterable[WorkerId]) -> int:
        """Begins a probe; returns its number."""
        self.probe += 1
        self.tries = 1
        self.asked_at = now
        self.asked = frozenset(members)
        self.found = {}
        return self.probe

    def ask_again(self, now: float) -> tuple[WorkerId, ...]:
        """Who is to be asked a second time before its silence counts; nobody if that was done."""
        if self.tries != 1 or self.asked_at is None or now < self.asked_at + self.probe_s:
            return ()
        self.tries = 2
        self.asked_at = now
        return tuple(sorted(self.asked - self.found.keys()))

    def located(self, now: float, worker: WorkerId, probe: int, position: Position) -> None:
        """An answer to a probe; late ones of earlier probes are ignored."""
        if probe != self.probe or self.asked_at is None or worker not in self.asked:
            return
        self.found[worker] = position
        self._complete(now)

    def expect(self, now: float, members: Iterable[WorkerId]) -> None:
        """Only these are waited for by now: others need not answer any more."""
        if self.asked_at is not None:
            self.asked &= frozenset(members)
            self._complete(now)

    def _complete(self, now: float) -> None:
        if not self.asked <= self.found.keys():
            return
        if self.unmoved_since is None or self.found != self.before:
            self.unmoved_since = now
        self.before = dict(self.found)
        self.asked_at = None
        self.complete_at = now

    def unanswered(self, now: float) -> tuple[WorkerId, ...]:
        """Who has not answered the probe in time, though asked twice."""
        if self.tries < 2 or self.asked_at is None or now < self.asked_at + self.probe_s:
            return ()
        return tuple(sorted(self.asked - self.found.keys()))

    def stuck(self, now: float) -> bool:
        """Whether everybody answers but nobody has moved for long."""
        return self.unmoved_since is not None and now >= self.unmoved_since + self.stuck_s

    def overdue(self, now: float) -> bool:
        """Whether nobody has moved for so long that this cannot be work any more."""
        return self.unmoved_since is not None and now >= self.unmoved_since + self.patience_s


def blame(positions: Mapping[WorkerId, Position]) -> WorkerId | None:
    """The one that others wait for: the furthest behind among those that do not wait. None where all wait or none does,
    or several are equally far."""
    busy = {w: p for w, p in positions.items() if not p.waiting}
    if not busy or len(busy) == len(positions):
        return None
    least = min(busy.values())
    behind = sorted(w for w, p in busy.items() if p == least)
    return behind[0] if len(behind) == 1 else None
