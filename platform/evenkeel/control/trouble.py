"""Counts what goes wrong without progress, so that nothing loops and no poison batch is tried for ever."""

from collections import Counter, defaultdict
from dataclasses import dataclass, field

from evenkeel.core.ids import Generation
from evenkeel.core.vote import Vote

MAX_EXCEPTIONS = 2
"""Generations in which training code raised in one step: the first is retried, the second ends the run."""
MAX_CRASHES = 3
"""Generations that one open step broke by killing workers before it counts as a poison batch."""
MAX_ATTEMPTS = 12
"""Generations in a row without a committed step, whatever the causes, before the run is given up."""


@dataclass
class Trouble:
    max_bad_steps: int
    attempts: int = 0
    bad_steps: int = 0
    raised: dict[int, set[Generation]] = field(default_factory=lambda: defaultdict(set))
    crashes: Counter[int] = field(default_factory=Counter)
    last: str = ""

    def committed(self, vote: Vote) -> None:
        """Progress: what went wrong up to this step is forgiven, but for steps that were skipped as not finite.

        An error in a later step stays: it may be heard before the report of the step that it follows.
        """
        self.attempts = 0
        for steps in (self.raised, self.crashes):
            for step in [step for step in steps if step <= vote.step]:
                del steps[step]
        self.bad_steps = self.bad_steps + 1 if vote.skip else 0

    def exception(self, step: int, generation: Generation, text: str) -> None:
        self.raised[step].add(generation)
        self.last = text

    def broken(self, open_step: int, crashed: bool, cause: str) -> None:
        """A generation was broken with this step open; `crashed` if it trained and workers died in it."""
        self.attempts += 1
        self.crashes[open_step] += crashed
        if not self.raised:
            self.last = cause

    def verdict(self, open_step: int) -> str | None:
        """Why the run must end, in one line; None while it may go on."""
        if self.bad_steps >= self.max_bad_steps:
            return f"step {open_step - 1}: loss or gradient not finite in {self.bad_steps} steps in a row"
        if len(self.raised.get(open_step, ())) >= MAX_EXCEPTIONS:
            return f"failed again after a retry: {self.last}"
        if self.crashes[open_step] >= MAX_CRASHES:
            return (
                f"step {open_step} took workers down {MAX_CRASHES} times, {self.last}"
                " (a batch that kills, or out of memory: see logs/)"
            )
        if self.attempts >= MAX_ATTEMPTS:
            return f"step {open_step}: {self.attempts} worlds in a row broke before a commit, {self.last}"
        return None
