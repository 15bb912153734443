"""What the controller hears (events) and what it asks for (commands). Values only; the shells move them.

Each message to a worker carries the controller's epoch and a generation; each message of a worker carries its
generation. One of an older epoch or generation changes nothing (design, rules 5, 10 and 14).
"""

from dataclasses import dataclass, field
from typing import Any

from evenkeel.control.entries import Entry as Entry
from evenkeel.control.entries import EpochBegun as EpochBegun
from evenkeel.control.entries import Restored as Restored
from evenkeel.control.entries import RunEnded as RunEnded
from evenkeel.control.entries import StepSettled as StepSettled
from evenkeel.control.entries import WorldOpened as WorldOpened
from evenkeel.control.parts import PHASES as PHASES
from evenkeel.control.parts import Answer as Answer
from evenkeel.control.parts import Decision as Decision
from evenkeel.control.parts import Fault as Fault
from evenkeel.control.parts import Held as Held
from evenkeel.control.parts import Position as Position
from evenkeel.control.parts import Report as Report
from evenkeel.control.stored import CheckpointCommitted as CheckpointCommitted
from evenkeel.control.stored import CheckpointFailed as CheckpointFailed
from evenkeel.control.stored import CheckpointUnreadable as CheckpointUnreadable
from evenkeel.control.stored import CommitCheckpoint as CommitCheckpoint
from evenkeel.control.stored import LookAt as LookAt
from evenkeel.control.stored import Looked as Looked
from evenkeel.control.stored import PartFailed as PartFailed
from evenkeel.control.stored import PartWritten as PartWritten
from evenkeel.control.stored import StillWriting as StillWriting
from evenkeel.core.ids import Generation, Version, WorkerId
from evenkeel.core.layout import WorkerInfo
from evenkeel.core.vote import Flags, Timing, Vote
from evenkeel.core.world import World

# ---------------------------------------------------------------- events


@dataclass(frozen=True, slots=True)
class Started:
    """The first event of a controller's life.

    Attributes:
        alive: the workers that it found; none in a new run.
        saved: versions with a complete checkpoint in the store.
        damaged: what is wrong with other checkpoints there, a line each.
        resume: the version that the user asks to begin from; None for the newest that there is.
    """

    alive: tuple[WorkerInfo, ...] = ()
    saved: tuple[Version, ...] = ()
    damaged: tuple[str, ...] = ()
    resume: Version | None = None


@dataclass(frozen=True, slots=True)
class WorkerReady:
    worker: WorkerInfo


@dataclass(frozen=True, slots=True)
class WorkerLost:
    """A worker is dead: pushed by the fleet, or the confirmation of a Kill.

    Attributes:
        with_node: its whole node is gone, so that nothing which it computed is to blame.
    """

    worker_id: WorkerId
    cause: str
    with_node: bool = False


@dataclass(frozen=True, slots=True)
class StartFailed:
    """The fleet could not start `count` of the workers asked for; it may be asked again later."""

    count: int
    error: str


@dataclass(frozen=True, slots=True)
class Reported:
    """The leader's progress: every completed vote that the controller has not acknowledged yet, oldest first.

    Sent once the leader's own commit is done (rule 4: a report is a witness). Usually one; more after a lost message.

    Attributes:
        timings: what the vote of the last one told that everybody has measured. It is no part of the vote, of which
            every worker keeps some, so that these stay small however many workers there are; a lost message loses it.
    """

    worker_id: WorkerId
    reports: tuple[Report, ...]
    timings: tuple[Timing, ...] = ()


@dataclass(frozen=True, slots=True)
class Failed:
    """A worker's training thread raised in this generation and has parked."""

    worker_id: WorkerId
    generation: Generation
    fault: Fault


@dataclass(frozen=True, slots=True)
class NotFinite:
    """A worker met an infinite or undefined loss or gradient in a step, which is skipped: `what` it was, in words."""

    worker_id: WorkerId
    step: int
    what: str


@dataclass(frozen=True, slots=True)
class Answered:
    worker_id: WorkerId
    generation: Generation
    ask: int
    answer: Answer


@dataclass(frozen=True, slots=True)
class Settled:
    """The decision is carried out; `held` is what the worker holds now."""

    worker_id: WorkerId
    generation: Generation
    ask: int
    held: tuple[Held, ...]


@dataclass(frozen=True, slots=True)
class Joined:
    """Connected to its groups and holding the world's base. `regroup_s` and `reshard_s` are seconds it took."""

    worker_id: WorkerId
    generation: Generation
    regroup_s: float = 0.0
    reshard_s: float = 0.0


@dataclass(frozen=True, slots=True)
class MemoryUsed:
    """In bytes, after a first step: the state by the formula (plan/memory.py), the rest measured (engine/memory.py)."""

    worker_id: WorkerId
    params: int
    grads: int
    optimizer: int
    activations: int
    peak: int
    available: int


@dataclass(frozen=True, slots=True)
class Located:
    """The reply to a Probe."""

    worker_id: WorkerId
    probe: int
    position: Position


@dataclass(frozen=True, slots=True)
class Finished:
    """The leader has written the final model. `eval_loss` is the last validation, if any.

    It carries the unacknowledged reports too, because it may overtake that of the last step.
    """

    worker_id: WorkerId
    generation: Generation
    reports: tuple[Report, ...]
    eval_loss: float | None = None


@dataclass(frozen=True, slots=True)
class StorageTrouble:
    """The store failed; the worker waits and tries again."""

    worker_id: WorkerId
    error: str


@dataclass(frozen=True, slots=True)
class StopRequested:
    reason: str


@dataclass(frozen=True, slots=True)
class Tick:
    """The time that a SetTimer asked for has come."""


Event = (
    Started
    | WorkerReady
    | WorkerLost
    | StartFailed
    | Reported
    | Failed
    | NotFinite
    | Answered
    | Settled
    | Joined
    | MemoryUsed
    | Located
    | Finished
    | PartWritten
    | PartFailed
    | StillWriting
    | StorageTrouble
    | CheckpointCommitted
    | CheckpointFailed
    | CheckpointUnreadable
    | Looked
    | StopRequested
    | Tick
)

# ---------------------------------------------------------------- commands


@dataclass(frozen=True, slots=True)
class Abort:
    """Break every group of generations <= generation, park, and answer. Also for generations not joined yet (rule 14).

    `acknowledged` is the last step whose report is durable.
    """

    worker_id: WorkerId
    epoch: int
    generation: Generation
    ask: int
    acknowledged: int


@dataclass(frozen=True, slots=True)
class Settle:
    worker_id: WorkerId
    epoch: int
    ask: int
    decision: Decision


@dataclass(frozen=True, slots=True)
class Form:
    worker_id: WorkerId
    epoch: int
    world: World


@dataclass(frozen=True, slots=True)
class Request:
    """Put flags on the next votes, until a committed vote carries them (rule 16). Sent to the leader."""

    worker_id: WorkerId
    epoch: int
    generation: Generation
    flags: Flags


@dataclass(frozen=True, slots=True)
class Probe:
    """Where are you? Answered from the control thread, whatever the training thread does."""

    worker_id: WorkerId
    epoch: int
    probe: int


@dataclass(frozen=True, slots=True)
class Kill:
    """End this worker's process. It is declared lost already; WorkerLost confirms that its device is free (rule 17)."""

    worker_id: WorkerId
    reason: str


@dataclass(frozen=True, slots=True)
class Start:
    """Start so many new workers in the background; each reports with WorkerReady."""

    count: int


@dataclass(frozen=True, slots=True)
class SetTimer:
    """Send a Tick at this time; replaces the timer that was set before."""

    at: float


@dataclass(frozen=True, slots=True)
class Metrics:
    """One line of metrics.jsonl: a committed step, now visible.

    `committed_at` is the unix second of the commit; None where nobody reported it, and the decision commits it now.
    """

    vote: Vote
    committed_at: float | None
    world_size: int


@dataclass(frozen=True, slots=True)
class Log:
    """One line of events.jsonl."""

    event: str
    generation: Generation
    step: int
    fields: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Status:
    """The run's status for run.json: starting, running, paused (with what it waits for)."""

    status: str
    waiting_for: str = ""


@dataclass(frozen=True, slots=True)
class End:
    """The run is over: finished, stopped or failed (with the error, one line). Every worker is to be ended."""

    status: str
    error: str = ""


Command = (
    Abort
    | Settle
    | Form
    | Request
    | Probe
    | Kill
    | Start
    | CommitCheckpoint
    | LookAt
    | SetTimer
    | Metrics
    | Log
    | Status
    | End
)


@dataclass(frozen=True, slots=True)
class Output:
    """What one event led to.

    The contract of the shell: first make every journal entry durable, in order; a lost race for an entry ends this
    controller. Only then start the commands, in order, without waiting for what they bring about; results come back
    as events. WorldOpened is also what worlds/NNNNNN.json is written from, before the first Metrics of its generation.
    """

    journal: tuple[Entry, ...] = ()
    commands: tuple[Command, ...] = ()
