"""Counts what goes wrong without progress, so that nothing loops and no poison batch is tried for ever."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

from evenkeel.core.ids import Generation
from evenkeel.core.vote import Vote

MAX_EXCEPTIONS = 2
"""Generations in which training code raised in one step: the first is retried, the second ends the run."""
MAX_CRASHES = 3
"""Generations that one open step broke by killing workers' processes before it counts as a poison batch."""
MAX_UNREADABLE = 3
"""Generations that could not begin as workers cannot read a checkpoint that is whole, without a commit between them."""
MAX_ATTEMPTS = 12
"""Generations in a row without a committed step, whatever the causes, before the run is given up."""


@dataclass(frozen=True, slots=True)
class Crash:
    """Workers that died in a step. `sure` unless nobody was left to say which it was: then it may be the one after.

    `who` names each with its signal or exit status. `suspect` unless all of them died of what no batch does, such as
    the loss of their node.
    """

    step: int
    sure: bool
    who: str
    suspect: bool = True

    @property
    def last(self) -> int:
        return self.step if self.sure else self.step + 1


@dataclass
class Trouble:
    max_bad_steps: int
    attempts: int = 0
    bad_steps: int = 0
    raised: dict[int, set[Generation]] = field(default_factory=lambda: defaultdict(set))
    crashes: list[Crash] = field(default_factory=list)
    """Of steps that were not committed since, also where the run went back to a checkpoint and came there again."""
    last: str = ""
    diverged: int = 0
    """The step before which the run went back because copies of the state differed; 0 once that is committed."""
    again: str = ""
    """What differed when copies did so again before that."""
    unreadable: dict[Generation, str] = field(default_factory=dict)
    """Since the last commit: which worker, where, could not read a checkpoint that is whole."""
    not_finite: str = ""
    """Who met what was not finite last, and what it was. The report of that step may be heard first."""

    def committed(self, vote: Vote) -> None:
        """Progress: what went wrong up to this step is forgiven, but for steps that were skipped as not finite.

        An error in a later step stays: it may be heard before the report of the step that it follows.
        """
        self.attempts = 0
        self.unreadable.clear()
        self.reached(vote.step)
        if self.raised:
            for step in [step for step in self.raised if step <= vote.step]:
                del self.raised[step]
        if self.crashes:
            self.crashes = [crash for crash in self.crashes if crash.last > vote.step]
        self.bad_steps = self.bad_steps + 1 if vote.skip else 0

    def exception(self, step: int, generation: Generation, text: str) -> None:
        self.raised[step].add(generation)
        self.last = text

    def broken(
        self, open_step: int, cause: str, died: Sequence[str] = (), sure: bool = True, suspect: bool = True
    ) -> None:
        """A generation was broken with this step open; `died` are the workers that died training in it, see Crash."""
        self.attempts += 1
        if died:
            self.crashes.append(Crash(open_step, sure, ", ".join(died), suspect))
        if not self.raised:
            self.last = cause

    def cannot_read(self, generation: Generation, text: str) -> None:
        """A worker could not read its part of a checkpoint that is whole."""
        self.unreadable[generation] = text

    def doubtful(self, step: int, what: str) -> None:
        """Copies of the version before `step` differ and nobody knows which is right, so that the run goes back."""
        if self.diverged:
            self.again = what
        self.diverged = max(self.diverged, step)

    def reached(self, step: int) -> None:
        """The run has this step: what differed before it does so no more."""
        if step >= self.diverged:
            self.diverged = 0

    def forgive(self) -> None:
        """The run is submitted again, to try anew."""
        self.diverged, self.again = 0, ""

    @property
    def present(self) -> bool:
        """Whether there is something to forgive, or to end the run for."""
        counted = self.attempts or self.bad_steps or self.diverged
        return bool(counted or self.raised or self.crashes or self.unreadable or self.again)

    def verdict(self, open_step: int) -> str | None:
        """Why the run must end, in one line; None while it may go on."""
        if self.again:
            return f"again after the run went back, {self.again}"
        if self.bad_steps >= self.max_bad_steps:
            often = f"step {open_step - 1}: loss or gradient not finite in {self.bad_steps} steps in a row"
            return f"{often}; {self.not_finite}" if self.not_finite else often
        if len(self.raised.get(open_step, ())) >= MAX_EXCEPTIONS:
            return f"failed again after a retry: {self.last}"
        if sum(crash.suspect for crash in self._crashes(open_step)) >= MAX_CRASHES:
            return self.deaths(open_step)
        if len(self.unreadable) >= MAX_UNREADABLE:
            last = list(self.unreadable.values())[-1]
            way_out = "see to the storage and the memory of that node, then the same command goes on from there"
            return f"{len(self.unreadable)} worlds could not begin: {last}; {way_out}"
        if self.attempts >= MAX_ATTEMPTS:
            return f"step {open_step}: {self.attempts} worlds in a row broke before a commit, {self.last}"
        return None

    def deaths(self, open_step: int) -> str:
        """Which workers died in this step, and how, in one line; "" if none did."""
        crashes = self._crashes(open_step)
        if not crashes:
            return ""
        step = max(crash.step for crash in crashes)
        suspects = [crash.who for crash in crashes if crash.suspect]
        if len(suspects) < 2:
            return f"workers died in step {step}: {', '.join(crash.who for crash in crashes)}"
        often = f"step {step} took workers down {len(suspects)} times: {', '.join(suspects)}"
        return f"{often} (a batch that kills, or out of memory: see logs/)"

    def _crashes(self, open_step: int) -> list[Crash]:
        """Those that may have been in the step of the last one, if that is this one."""
        newest = self.crashes[-1] if self.crashes else None
        if newest is None or not newest.step <= open_step <= newest.last:
            return []
        return [crash for crash in self.crashes if crash.step <= newest.last and crash.last >= newest.step]
