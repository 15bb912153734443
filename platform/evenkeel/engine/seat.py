"""A worker's place in the protocol, shared by its threads: the Member behind the one lock of the worker."""

import threading
from collections.abc import Sequence

from evenkeel.control.member import Member
from evenkeel.control.messages import Finished, Reported
from evenkeel.core.ids import WorkerId
from evenkeel.core.vote import Flags, Vote


class Seat:
    """The member, its lock, and the training thread's calls. Waiters on `changed` are told of every change.

    Control threads take the lock themselves where they do several things at once.
    """

    def __init__(self, worker_id: WorkerId) -> None:
        self.changed = threading.Condition()
        self.member = Member(worker_id)

    def running(self, generation: int) -> bool:
        """Without the lock: the floor only grows, and reading an int is atomic."""
        return self.member.running(generation)

    def flags(self, step: int) -> Flags:
        """What this worker asks of the vote of a step."""
        with self.changed:
            return self.member.flags(step)

    def busy(self, step: int, writing: bool) -> bool:
        """What it says in the vote of a step about its last checkpoint, which it may still be writing."""
        with self.changed:
            return self.member.busy(step, writing)

    def measures(self, step: int) -> bool:
        """Whether the vote of a step tells what was measured; see Member.measures."""
        with self.changed:
            return self.member.measures(step)

    def compares(self, step: int) -> bool:
        """Whether the vote of a step compares copies; see Member.compares."""
        with self.changed:
            return self.member.compares(step)

    @property
    def diverged(self) -> bool:
        """Whether the vote of the open step was refused because copies differ."""
        with self.changed:
            return self.member.diverged is not None

    def mirroring(self) -> bool:
        """What it says in a vote about its last mirror, which it may still be sending or receiving."""
        with self.changed:
            return self.member.mirroring

    def begin_sums(self, count: int) -> None:
        with self.changed:
            self.member.begin_sums(count)

    def sum_done(self) -> None:
        with self.changed:
            self.member.sum_done()

    def prepare(self, generation: int, step: int) -> None:
        with self.changed:
            self.member.prepare(generation, step)

    def see(self, vote: Vote, told: Sequence[float]) -> bool:
        """Whether the vote counts; see Member.see."""
        with self.changed:
            return self.member.see(vote, told)

    def begin_commit(self) -> None:
        with self.changed:
            self.member.begin_commit()

    def end_commit(self, committed_at: float) -> Reported | None:
        with self.changed:
            return self.member.end_commit(committed_at)

    def finished(self, eval_loss: float | None) -> Finished | None:
        with self.changed:
            return self.member.finished(eval_loss)

    def park(self) -> None:
        with self.changed:
            self.member.park()
            self.changed.notify_all()

    def wait_for_room(self, generation: int) -> None:
        """Blocks a leader whose controller has acknowledged nothing for a whole ring of votes (rule 16)."""
        with self.changed:
            self.changed.wait_for(
                lambda: not (self._leads() and self.member.ring_full) or not self.member.running(generation)
            )

    def _leads(self) -> bool:
        world = self.member.world
        return world is not None and world.leader == self.member.worker_id
