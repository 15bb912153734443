"""Collectives between simulated workers: complete when all have come, but each learns it in its own time."""

from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random
from typing import TYPE_CHECKING

from evenkeel.core.ids import WorkerId
from evenkeel.core.vote import SLOTS

if TYPE_CHECKING:
    from evenkeel.sim.worker import SimWorker

Key = tuple[int, int, str]
"""Generation, step and name."""


@dataclass
class Meeting:
    members: tuple[WorkerId, ...]
    arrived: dict[WorkerId, tuple["SimWorker", int, Callable[[], None]]] = field(default_factory=dict)
    sums: list[float] = field(default_factory=list)
    returned: set[WorkerId] = field(default_factory=set)


class Meetings:
    """All open collectives. What a worker has put in stays in, also if it aborts afterwards: the worst case.

    Args:
        mischief: a source of its own for the collectives that lie, so that they leave the rest of a seed as it was.
        lying: how often a broken collective with values seems to have succeeded with a part of its sums.
        skew: how far apart the members learn of its completion, in hundredths of a second.
    """

    def __init__(self, rng: Random, mischief: Random, lying: float, skew: float) -> None:
        self.rng = rng
        self.mischief = mischief
        self.lying = lying
        self.skew = skew
        self.open: dict[Key, Meeting] = {}
        self.votes: dict[tuple[int, int], tuple[float, ...]] = {}
        """The sums of the values of every vote that is complete, by generation and step."""

    def arrive(
        self,
        worker: "SimWorker",
        key: Key,
        members: tuple[WorkerId, ...],
        then: Callable[[], None],
        values: tuple[float, ...] = (),
    ) -> None:
        meeting = self.open.setdefault(key, Meeting(members))
        assert meeting.members == members, f"{key}: {worker.info.worker_id} expects {members}, others {meeting.members}"
        meeting.arrived[worker.info.worker_id] = (worker, worker.task, then)
        meeting.sums = [a + b for a, b in zip(meeting.sums or [0.0] * len(values), values, strict=True)]
        if len(meeting.arrived) == len(members):
            del self.open[key]
            self._complete(key, meeting)
        elif any(not worker.fleet.workers[w].alive for w in members):
            self._break(meeting)

    def _complete(self, key: Key, meeting: Meeting) -> None:
        sums = tuple(meeting.sums)
        if sums:
            self.votes[key[0], key[1]] = sums[:SLOTS]
        for member in meeting.members:
            worker, task, then = meeting.arrived[member]
            if worker.task == task:
                skew = 1.0 if self.skew >= 100 and member == meeting.members[0] else self.skew
                worker.later(skew * self.rng.uniform(0.0005, 0.01), _return(meeting, worker, then, sums))

    def died(self, dead: WorkerId) -> None:
        """Neighbours of a dead worker mostly get an error at once; the others hang until they are told to abort."""
        for meeting in [x for x in self.open.values() if dead in x.members]:
            self._break(meeting)

    def _break(self, meeting: Meeting) -> None:
        for member in meeting.members:
            if member not in meeting.arrived:
                continue
            worker, task, then = meeting.arrived[member]
            if self.lying and meeting.sums and worker.task == task and self.mischief.random() < self.lying:
                lie = _return(meeting, worker, then, tuple(meeting.sums))
                worker.later(self.mischief.uniform(0.001, 0.02), lie)
            elif self.rng.random() < 0.5 and worker.task == task:
                worker.later(self.rng.uniform(0.001, 0.02), _raise(meeting, worker))


def _return(
    meeting: Meeting, worker: "SimWorker", then: Callable[[], None], sums: tuple[float, ...]
) -> Callable[[], None]:
    def call() -> None:
        if worker.info.worker_id in meeting.returned:
            return
        meeting.returned.add(worker.info.worker_id)
        worker.waiting = False
        if sums:
            worker.voted(sums)
        else:
            then()

    return call


def _raise(meeting: Meeting, worker: "SimWorker") -> Callable[[], None]:
    """A call returns once: who has had a result of this collective has no error of it any more."""

    def call() -> None:
        if worker.info.worker_id not in meeting.returned:
            meeting.returned.add(worker.info.worker_id)
            worker.broken()

    return call
