"""The simulated metrics.jsonl. On an object store its last lines are not durable, and lost with the controller."""

from collections.abc import Sequence

from evenkeel.control import messages as m
from evenkeel.core.vote import Vote


class Lines:
    """One vote a line, in the order in which they became visible.

    Args:
        at_once: so many lines are written together, unless a command needs them earlier; 1 on a local path.
    """

    def __init__(self, at_once: int) -> None:
        self.votes: list[Vote] = []
        self._at_once = at_once
        self._durable = 0

    def append(self, vote: Vote) -> None:
        self.votes.append(vote)
        if len(self.votes) - self._durable >= self._at_once:
            self._durable = len(self.votes)

    def before(self, command: m.Command) -> None:
        """As the shell does: an abort acknowledges steps, and whoever reads a checkpoint finds the lines up to it."""
        if isinstance(command, m.Abort | m.CommitCheckpoint):
            self._durable = len(self.votes)

    def lose(self) -> Sequence[Vote]:
        """The controller has died: takes away what was not durable, and returns it."""
        lost = self.votes[self._durable :]
        del self.votes[self._durable :]
        return lost
