"""All that the controller knows, and how it says something. The other files of this folder are functions of it."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from evenkeel.control import messages as m
from evenkeel.control.incident import Incident
from evenkeel.control.liveness import Liveness
from evenkeel.control.modes import Ended, Mode, world_of
from evenkeel.control.policy import Policy
from evenkeel.control.roster import Roster
from evenkeel.control.trouble import Trouble
from evenkeel.core.ids import INITIAL, Generation, Version, WorkerId
from evenkeel.core.layout import Layout
from evenkeel.core.vote import Flags, Vote
from evenkeel.core.world import World

if TYPE_CHECKING:
    from evenkeel.control.balancing import Balance
    from evenkeel.control.saving import Upload


@dataclass
class State:
    """One life of the controller of one run.

    Attributes:
        committed: the version that everybody's state is, or will be once a decision is carried out.
        visible: the last step that was shown.
        witness: the last vote of the current generation in a report that was accepted (rule 4).
        decision: the last one, with the answers that it rests on.
        holdings: what each worker held when the last decision that it took part in was carried out. Of those that have
            a place in the present world it is out of date once that commits, and then has an old version.
        arrived: workers have become ready by the events in hand.
        pending: requests that no committed vote has carried yet (rule 16).
        incident: the disturbance that is being repaired.
        over: the final model is written; what is left is to say so, at the next tick.
        blamed: who was furthest behind when a world without progress was rebuilt.
        saving: the last visible vote that says that its step is saved.
        saved: versions with a complete checkpoint that can still be gone back to, newest first.
        damaged: what is wrong with checkpoints that cannot be gone back to.
        imported: the checkpoint that was put into the run directory, if a world began from one: the run's beginning.
        uploads: checkpoints that are being written.
        manifests: versions whose manifest is being written, also of attempts that were given up meanwhile.
        unsure: versions whose manifest could not be written, as this life was told; it may be there all the same.
        looks: second looks that are awaited, by version and file: who could not read it, and what each said.
        saved_at_step: the last step of which a checkpoint was begun, or from which the run went on.
        save_cost_s: for how long the last checkpoint held up the training; 0 if that is not known.
        save_failures: in a row; save_error says why the last one failed.
        restores: each base that the run went back to, with the generation up to which it took back what came after.
        resume: the version that the user asks to begin from.
        doubt: why no copy of the committed version counts, until the run has gone back; "" if they do.
        distrusted: versions whose checkpoints may hold a wrong copy.
        unproven: versions with which a generation ended, before a vote could compare the copies of who wrote them.
        total_losses: how often nobody alive held the state, nor a mirror of it, in all lives.
        worker_seconds: time that workers worked, in all lives.
        balance: what is known of the workers' speeds; None before anything is asked of it.
        journal, commands: what the event in hand has led to so far.
    """

    policy: Policy
    epoch: int
    roster: Roster
    trouble: Trouble
    asks: int
    mode: Mode
    liveness: Liveness = field(default_factory=Liveness)
    generation: Generation = 0
    layout: Layout | None = None
    committed: Version = INITIAL
    visible: int = 0
    witness: Vote | None = None
    decision: m.Decision | None = None
    evidence: dict[str, m.Answer] = field(default_factory=dict)
    holdings: dict[WorkerId, tuple[m.Held, ...]] = field(default_factory=dict)
    arrived: bool = False
    pending: Flags = Flags.NONE
    stop_reason: str = ""
    incident: Incident | None = None
    over: bool = False
    blamed: set[WorkerId] = field(default_factory=set)
    saving: Vote | None = None
    saved: list[Version] = field(default_factory=list)
    damaged: list[str] = field(default_factory=list)
    imported: Version | None = None
    uploads: dict[Version, "Upload"] = field(default_factory=dict)
    manifests: set[Version] = field(default_factory=set)
    unsure: set[Version] = field(default_factory=set)
    looks: dict[tuple[Version, str], dict[WorkerId, str]] = field(default_factory=dict)
    saved_at_step: int = 0
    save_cost_s: float = 0.0
    save_failures: int = 0
    save_error: str = ""
    restores: list[tuple[Version, Generation]] = field(default_factory=list)
    resume: Version | None = None
    doubt: str = ""
    distrusted: set[Version] = field(default_factory=set)
    unproven: set[Version] = field(default_factory=set)
    total_losses: int = 0
    worker_seconds: float = 0.0
    balance: "Balance | None" = None
    journal: list[m.Entry] = field(default_factory=list)
    commands: list[m.Command] = field(default_factory=list)

    # ------------------------------------------------------------ what follows from it

    @property
    def world(self) -> World | None:
        """The world that is being formed, runs, or is being repaired."""
        return world_of(self.mode)

    def survivors(self, world: World) -> tuple[WorkerId, ...]:
        alive = self.roster.alive
        return tuple([worker for worker in world.layout.members if worker in alive])

    def decided(self, world: World) -> bool:
        """Whether its open step is settled, once and for all (rule 6)."""
        return self.decision is not None and self.decision.generation == world.generation

    def accepts(self, vote: Vote) -> bool:
        """A report counts while its generation is open, which is until the decision (rule 5)."""
        world = self.world
        return (
            world is not None
            and vote.generation == world.generation
            and vote.step > self.visible
            and not self.decided(world)
            and not vote.differences
        )

    # ------------------------------------------------------------ what it says

    def say(self, *commands: m.Command) -> None:
        self.commands.extend(commands)

    def output(self, entries: int | None = None, commands: int | None = None) -> m.Output:
        """Takes away what has been said so far, or so much of it."""
        output = m.Output(tuple(self.journal[:entries]), tuple(self.commands[:commands]))
        del self.journal[:entries], self.commands[:commands]
        return output

    def log(self, event: str, **fields: object) -> None:
        """A line of events.jsonl."""
        self.say(m.Log(event, self.generation, self.committed.step, fields))

    def show(self, vote: Vote, committed_at: float | None) -> None:
        """A committed step becomes visible: its line is durable before anything else follows from it (rule 4).

        Args:
            committed_at: unix second, as the leader reported it; None if only a decision says that it is committed.
        """
        self.visible = vote.step
        self.witness = vote
        self.saving = vote if vote.saves else self.saving
        self.trouble.committed(vote)
        world = self.world
        assert world is not None
        self.say(m.Metrics(vote, committed_at, world.size))
        if vote.eval_loss is not None:
            self.log("validation", version=vote.step - 1, loss=vote.eval_loss)

    def end(self, status: str, error: str = "") -> None:
        if self.incident is not None and not self.incident.planned:
            self.log("incident_unfinished", cause=self.incident.cause, lost=list(self.incident.lost))
        self.mode = Ended(status, error)
        self.journal.append(m.RunEnded(status, error))
        self.say(m.End(status, error))


def names(lost: Sequence[str]) -> str:
    """A list for an error message, cut where it is long."""
    shown = ", ".join(lost[:8])
    return shown if len(lost) <= 8 else f"{shown} and {len(lost) - 8} more"
