"""What one simulated run is made of: a cluster, a network, a store, and faults; see draw.py for random ones."""

from dataclasses import dataclass
from math import inf

from evenkeel.control.policy import Policy
from evenkeel.sim.pace import Paces

WORKER_FAULTS = ("crash", "hang", "suspect", "exception", "slow", "cut")
MOMENTS = ("regroup", "reshard", "forward", "reduce", "vote", "commit", "settle")
REPAIR_MOMENTS = ("abort", "decision", "settle", "regroup", "reshard", "joined", "finish")
MODES = ("Forming", "Running", "Aborting", "Settling")
MIRROR_MOMENTS = ("mirroring", "mirrored")
LOOKING_MOMENTS = ("looking", "looked")
SAVING_MOMENTS = ("saving", "part written", "manifest written", "loading")

SLACK_S = 5.0
"""For repairs; far below the shortest limit after which a world that does nothing is noticed."""


@dataclass(frozen=True, slots=True)
class Fault:
    """What goes wrong, and when.

    Attributes:
        kind: of WORKER_FAULTS, or "flip" (a bit of its state changes), "node" (all its workers crash), "stage" (all who
            train the same shard crash), "all" (everybody dies), "controller", or "stop" (a request to stop the run).
        at: virtual seconds, or None to strike at a moment.
        moment: what the victim is doing when it strikes, of the lists above; for the controller the mode that it enters
            (or "Ended"), "shown": it has made a step visible, or what it has just heard or said of a checkpoint.
        countdown: it strikes the so-manieth time that somebody is at that moment.
        at_once: before the victim does anything at that moment, instead of up to 20 ms later.
    """

    kind: str
    at: float | None = None
    moment: str = ""
    countdown: int = 1
    seconds: float = 0.0
    at_once: bool = False


@dataclass(frozen=True, slots=True)
class Network:
    """Between the controller and the workers; seconds and probabilities."""

    delay_s: float
    jitter_s: float
    late: float
    """How often a message takes up to a second longer."""
    duplicate: float
    lose: float


@dataclass(frozen=True, slots=True)
class Storage:
    """How the store of checkpoints does; seconds and probabilities.

    Attributes:
        write_s, commit_s: what a part and a manifest usually take.
        arrives: how often a manifest is there whose writing failed, as only the answer is lost.
        slow: how often one of them takes seconds, or longer than anybody waits.
        damaged: how often a checkpoint is listed, but cannot be read.
        misreads: how many of the workers can read no checkpoint, though these are whole.
        told_twice, told_late, told_never: how often a worker's word about its part comes twice, up to seconds later, or
            not at all.
        asked_back: how often who submits a run again, when nobody is alive, asks for an earlier version.
        keep: checkpoints that stay when a newer one is complete.
        lines_at_once: so many lines of metrics are written together: what is not is lost with the controller.
    """

    write_s: float
    commit_s: float
    part_fails: float = 0.0
    commit_fails: float = 0.0
    arrives: float = 0.3
    slow: float = 0.0
    damaged: float = 0.0
    misreads: float = 0.0
    told_twice: float = 0.0
    told_late: float = 0.0
    told_never: float = 0.0
    asked_back: float = 0.0
    keep: int = 2
    lines_at_once: int = 1


@dataclass(frozen=True, slots=True)
class Scenario:
    """One run.

    Attributes:
        step_s, start_s: virtual seconds of a step's computation, and about those that a worker takes to start.
        start_fails, nonfinite: probabilities, per start and per worker's vote.
        straggle_s: up to so many seconds more for every other worker's start: it comes when the run is under way.
        skew: the members of a collective learn up to so many hundredths of a second after one another that it is
            complete; from 100 on its first member learns at once.
        late_reports: how often a leader's report takes up to a second longer.
        lying: how often a collective that a death breaks looks complete to a member, with a part of the sums (rule 2).
        storage: None for a run without checkpoints.
        paces: of workers that differ in speed; None: all are equal, and a step takes the same whatever the layout.
    """

    seed: int
    policy: Policy
    nodes: int
    workers_per_node: int
    network: Network
    faults: tuple[Fault, ...]
    step_s: float
    start_s: float
    start_fails: float
    nonfinite: float
    straggle_s: float = 0.0
    late_reports: float = 0.0
    lying: float = 0.0
    skew: float = 1.0
    storage: Storage | None = None
    paces: Paces | None = None

    @property
    def calm(self) -> bool:
        """Whether no message is lost or much too late."""
        return not (self.network.lose or self.network.late)

    @property
    def flips(self) -> bool:
        """Whether copies may differ."""
        return any(fault.kind == "flip" for fault in self.faults)

    @property
    def ends_by(self) -> float:
        """When the run must have ended if all its faults are such that are noticed at once, else infinity."""
        slowly = self.start_fails or self.late_reports or self.skew > 30 or not self.calm or self.paces
        if slowly or {f.kind for f in self.faults} & {"hang", "cut", "slow", "suspect"}:
            return inf
        lives = 1 + len(self.faults)
        starts_s = self.policy.gather_s + lives * (1.5 * self.start_s + self.straggle_s)
        trains_s = 2 * self.policy.last_step * (1.5 * self.step_s + 0.3)
        if self.storage is not None and (self.storage.slow or self.storage.told_never or self.storage.misreads):
            return inf
        if self.storage is not None or self.policy.mirror_every:
            # Each fault may take the run back to its beginning, and nobody is known to anybody then.
            starts_s += lives * self.policy.gather_s
            trains_s *= lives
        return self.quiet_after + starts_s + trains_s + SLACK_S

    @property
    def quiet_after(self) -> float:
        """When no timed fault strikes any more."""
        return max((f.at + f.seconds for f in self.faults if f.at is not None), default=0.0)
