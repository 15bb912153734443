"""What a run was asked for, as the controller needs it."""

from collections.abc import Sequence
from dataclasses import dataclass

from evenkeel.core.layout import Layout, WorkerInfo
from evenkeel.core.model import ModelShape
from evenkeel.core.world import COMPARE_EVERY
from evenkeel.plan.layout import Wish
from evenkeel.plan.memory import Uses, copies_that_fit
from evenkeel.plan.speeds import Speeds


@dataclass(frozen=True, slots=True)
class Policy:
    """The fixed facts of a run.

    Attributes:
        last_step: train.steps.
        spares: ready workers to hold beside the world.
        max_bad_steps: how many steps in a row may be skipped as not finite.
        precision: "fp32", "bf16" or "fp64": how much memory the state takes.
        copies: how many workers keep and update each element of the state; None: as many as fit.
        compare_every: every so many steps the vote compares the copies.
        mirror_every: steps between two mirrors of what only one worker keeps; 0: there are none.
        checkpoint_every: steps between two checkpoints; 0: the optimum; None: none are written, as there is no store.
        max_checkpoint_failures: so many checkpoints in a row that cannot be written end the run; None: they never do.
        rebalance: work is shared out by measured speed; False: all are taken for equal, and nothing is measured.
        profiled: what a profile says of layers and kinds of device; None: there is none.
        slowed: ranks and factors of workers that are made slow in all steps (emulation).
        gather_s: seconds after the last new worker that a run with enough, but not all workers waits for the rest.
    """

    model: ModelShape
    wish: Wish
    micro_batches: int
    last_step: int
    spares: int = 0
    max_bad_steps: int = 10
    precision: str = "fp32"
    copies: int | None = None
    compare_every: int = COMPARE_EVERY
    mirror_every: int = 0
    checkpoint_every: int | None = None
    max_checkpoint_failures: int | None = None
    gather_s: float = 10.0
    rebalance: bool = False
    profiled: Speeds | None = None
    slowed: tuple[tuple[int, float], ...] = ()

    @property
    def uses(self) -> Uses:
        """What it keeps in host memory beside the state."""
        return Uses(self.checkpoint_every is not None, self.mirror_every > 0)

    def copies_in(self, layout: Layout, members: Sequence[WorkerInfo]) -> tuple[int | None, str]:
        """How many, None for all that hold a parameter; and why not all, where nobody asked for fewer."""
        if self.copies is None:
            return copies_that_fit(layout, self.model, members, self.precision, self.uses)
        return (None if self.copies >= len(layout.pipelines) else self.copies), ""
