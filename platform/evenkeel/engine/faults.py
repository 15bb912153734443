"""Planned faults: real signals and exceptions at exact moments of a step, a checkpoint, a mirror or a recovery."""

import os
import signal
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from evenkeel.core.ids import WorkerId
from evenkeel.core.world import World

STEP_PHASES = ("forward", "backward", "reduce", "before_vote", "after_vote", "commit")
SAVE_PHASES = ("save", "write", "written")
MIRROR_PHASES = ("mirror", "exchange", "mirrored")
RECOVERY, LOAD = "recovery", "load"
FLIP = "flip"
KINDS = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP, "segv": signal.SIGSEGV}


class InjectedError(RuntimeError):
    """What a planned fault of kind "exception" raises in the training code."""


@dataclass(frozen=True, slots=True)
class FaultPlan:
    """One planned fault.

    Attributes:
        index: its place in the configured list; each index fires once per run, across resumes.
        step: the step in which it fires; in SAVE_PHASES and MIRROR_PHASES the first checkpoint or mirror of a step that
            is not below it, in "recovery" and "load" the first such world whose open step is not.
        phase: one of STEP_PHASES;
            or of a checkpoint "save": the step is committed and nothing is copied yet, "write": the part is copied and
            about to be written, by its own thread, "written": it is durable and nobody has been told;
            or of a mirror "mirror": the step is committed and nothing is copied yet, "exchange": its own snapshot is
            taken and about to be sent, and those of others received, by a thread, "mirrored": they are here and do not
            count yet;
            or "recovery": a generation after the first is formed;
            or "load": the worker has read its shard from a checkpoint and does not count as its holder yet.
        target: "rank:N"; "stage:S", which is the first worker of stage S in the first pipeline that has one; or
            "spare", a worker that has held no place yet (but for "recovery" and "load" it is signalled while idle, once
            the step before is acknowledged; it runs no training code there that could raise).
        kind: "kill", "stop", "segv", "exception", or "flip": a bit of the worker's state changes silently.
    """

    index: int
    step: int
    phase: str
    target: str
    kind: str


def once_in(directory: Path) -> Callable[[int], bool]:
    """A Job.fault_once that leaves a marker file per fault in a directory that all workers share."""
    return _Once(directory)


@dataclass(frozen=True, slots=True)
class _Once:
    directory: Path

    def __call__(self, index: int) -> bool:
        try:
            os.close(os.open(self.directory / f"fault-{index}", os.O_CREAT | os.O_EXCL | os.O_WRONLY))
        except FileExistsError:
            return False
        return True


class Faults:
    """The planned faults that this worker may be the target of; `fire` costs one empty loop where there are none.

    Args:
        flip: carries out the kind "flip".
    """

    def __init__(
        self,
        worker_id: WorkerId,
        plans: Sequence[FaultPlan],
        once: Callable[[int], bool],
        flip: Callable[[], None] = lambda: None,
    ) -> None:
        self._flip = flip
        self._worker_id = worker_id
        self._plans = tuple(plans)
        self._once = once
        self._mine: tuple[FaultPlan, ...] = ()
        self._was_spare = True

    def joining(self, world: World) -> None:
        """The worker has been given a place; to be called before it does anything for that world."""
        targets = {f"rank:{world.layout.places[self._worker_id].rank}", *_leads(world, self._worker_id)}
        if self._was_spare:
            targets.add("spare")
        self._mine = tuple(p for p in self._plans if p.target in targets)
        self._was_spare = False

    def recovering(self, world: World) -> None:
        """Fires what is planned for a recovery; to be called between regrouping and resharding."""
        if world.generation > 1:
            self._fire_forming(RECOVERY, world)

    def loaded(self, world: World) -> None:
        """Fires what is planned for a load; to be called when the state is there that the world begins from."""
        if world.saved:
            self._fire_forming(LOAD, world)

    def fire(self, phase: str, step: int) -> None:
        """Fires what is planned for this phase of this step. Raises InjectedError for the kind "exception"."""
        for plan in self._mine:
            due = plan.step == step or (plan.step < step and phase in (*SAVE_PHASES, *MIRROR_PHASES))
            if due and plan.phase == phase and plan.target != "spare":
                self._fire(plan)

    def idle(self, acknowledged: int) -> None:
        """Fires on a spare: the step after `acknowledged` is the one that the others are in."""
        if self._was_spare:
            for plan in self._plans:
                due = plan.phase not in (RECOVERY, LOAD) and plan.step <= acknowledged + 1
                if plan.target == "spare" and due and plan.kind in KINDS:
                    self._fire(plan)

    def _fire_forming(self, phase: str, world: World) -> None:
        for plan in self._mine:
            if plan.phase == phase and plan.step <= world.base.step + 1:
                self._fire(plan)

    def _fire(self, plan: FaultPlan) -> None:
        if not self._once(plan.index):
            return
        if plan.kind in KINDS:
            # To this thread: a signal to the process may be taken by another one, while this one goes on.
            signal.pthread_kill(threading.get_ident(), KINDS[plan.kind])
        elif plan.kind == FLIP:
            self._flip()
        else:
            raise InjectedError(f"planned fault {plan.index}: {plan.phase} of step {plan.step}")


def _leads(world: World, worker: WorkerId) -> tuple[str, ...]:
    """"stage:S" if the worker is the one that stands for stage S."""
    place = world.layout.places[worker]
    first = next(i for i, p in enumerate(world.layout.pipelines) if len(p.stages) > place.stage)
    return (f"stage:{place.stage}",) if (place.pipeline, place.tp) == (first, 0) else ()
