"""Where the time went."""

from dataclasses import dataclass, field

from evenkeel.sim.goodput.setting import CAUSES


@dataclass
class _Stretch:
    """Committed steps in a row that took equally long."""

    first: int
    count: int
    step_s: float


@dataclass
class Ledger:
    """Accounts for every second up to `at`, once.

    Attributes:
        full_step_s: seconds of a step at full strength; what a step takes longer is "degraded".
        seconds: by cause.
    """

    full_step_s: float
    at: float = 0.0
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(CAUSES, 0.0))
    _stretches: list[_Stretch] = field(default_factory=list)

    def spend(self, until: float, cause: str) -> None:
        """All that is not accounted for up to `until` has this cause."""
        self.seconds[cause] += until - self.at
        self.at = until

    def commit(self, until: float, first: int, count: int, step_s: float) -> None:
        """Steps from `first` on were committed, the last one at `until`; nothing else happened meanwhile."""
        last = self._stretches[-1] if self._stretches else None
        if last is not None and last.first + last.count == first and last.step_s == step_s:
            last.count += count
        else:
            self._stretches.append(_Stretch(first, count, step_s))
        self._book(count, until - self.at, +1)
        self.at = until

    def take_back(self, base: int) -> None:
        """The run went back: the steps after `base` are to be done again."""
        while self._stretches and self._stretches[-1].first + self._stretches[-1].count - 1 > base:
            last = self._stretches.pop()
            kept = max(0, base + 1 - last.first)
            lost = last.count - kept
            self._book(lost, lost * last.step_s, -1)
            self.seconds["redo"] += lost * last.step_s
            if kept:
                self._stretches.append(_Stretch(last.first, kept, last.step_s))

    def _book(self, steps: int, seconds: float, sign: int) -> None:
        productive = min(seconds, steps * self.full_step_s)
        self.seconds["productive"] += sign * productive
        self.seconds["degraded"] += sign * (seconds - productive)
