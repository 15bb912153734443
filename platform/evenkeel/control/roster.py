"""Who is alive, on the way, being killed, or gone for good."""

from dataclasses import dataclass, field

from evenkeel.core.ids import WorkerId
from evenkeel.core.layout import WorkerInfo

RETRY_S = 5.0
"""Before a failed start is tried again; doubles up to RETRY_MAX_S."""
RETRY_MAX_S = 60.0
MAX_START_FAILURES = 6
"""Failed starts in a row, with nobody alive, before the run is given up."""


@dataclass
class Roster:
    """The fleet as the controller knows it. `wanted` is how many workers there should be, spares included."""

    wanted: int
    alive: dict[WorkerId, WorkerInfo] = field(default_factory=dict)
    dying: set[WorkerId] = field(default_factory=set)
    gone: set[WorkerId] = field(default_factory=set)
    earlier: set[WorkerId] = field(default_factory=set)
    """Workers of this controller's lives before."""
    starting: int = 0
    failures: int = 0
    retry_at: float | None = None

    def begin(self) -> None:
        """All that are left of earlier lives were added: the death of another one is no failed start of this life."""
        self.gone |= self.earlier - self.alive.keys()

    def add(self, worker: WorkerInfo) -> bool:
        """A worker is ready; False if it is known already or was declared lost."""
        if worker.worker_id in self.gone or worker.worker_id in self.alive:
            return False
        self.starting = max(0, self.starting - 1)
        self.failures = 0
        self.alive[worker.worker_id] = worker
        return True

    def remove(self, worker_id: WorkerId) -> None:
        """From here on nothing that this worker says counts, whether it lives or not (rule 17)."""
        self.alive.pop(worker_id, None)
        self.gone.add(worker_id)

    def start_failed(self, now: float, count: int) -> None:
        """Several that fail before the next try count once: a lost node takes all that were starting there."""
        self.starting = max(0, self.starting - count)
        if self.retry_at is None:
            self.failures += 1
            self.retry_at = now + min(RETRY_MAX_S, RETRY_S * 2 ** (self.failures - 1))

    @property
    def hopeless(self) -> bool:
        return self.failures >= MAX_START_FAILURES and not self.alive

    def to_start(self, now: float) -> int:
        """How many to ask for: neither alive nor on their way nor still holding a device (rule 17)."""
        if self.retry_at is not None and now < self.retry_at:
            return 0
        self.retry_at = None
        missing = max(0, self.wanted - len(self.alive) - self.starting - len(self.dying))
        self.starting += missing
        return missing
