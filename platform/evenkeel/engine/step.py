"""The training step, from top to bottom. Elasticity enters it only as a new layout (see training.py)."""

import math
import time

import torch

from evenkeel.control.messages import NotFinite, Reported
from evenkeel.core.vote import SLOTS, Slot, Vote, put_flags
from evenkeel.engine.checksum import part_checksum
from evenkeel.engine.faults import Faults
from evenkeel.engine.holdings import Memory
from evenkeel.engine.job import Settings
from evenkeel.engine.optimizer import gradient_scale, learning_rate
from evenkeel.engine.progress import AbortedError
from evenkeel.engine.seat import Seat
from evenkeel.engine.training import Sums, Training
from evenkeel.plan import timing
from evenkeel.plan.comparison import checksums, read_vote


class DivergedError(Exception):
    """The vote says that copies of the state differ: nobody commits the step, and the controller decides."""


def train_step(t: Training, step: int) -> Vote:
    """Computes step `step` up to its vote, which says how to commit it; design, section 4.

    Returns:
        The completed vote. The gradients of the step are summed and in hand.

    Raises:
        AbortedError: if the generation was aborted; nothing that outlives the step has changed then.
        DivergedError: likewise.
        GroupBroken: if a neighbour is gone, also where only a mirror noticed it.
        MirrorError: if a mirror could not be made for a reason of this process.
    """
    t.begin(step)
    # 0. Publish: begun here, so before any other collective of the step; each layer waits for its own parameters.
    t.sums.publish()

    # Validation of the version that this step starts from; its sums ride on this step's vote.
    every = t.settings.eval_every
    validation = t.evaluate() if every and (step - 1) % every == 0 else Sums()

    # 1. Compute: this stage's passes over its pipeline's share of the micro-batches.
    t.memory.state.zero_grad()
    t.sums.begin()
    try:
        training = t.compute()
    finally:
        t.sums.detach()

    # 2. Reduce: the sums of each segment over the pipelines, most of them begun during the last backward pass.
    t.progress.enter("reduce")
    t.faults.fire("reduce", step)
    t.sums.finish()

    # 3. Vote: the last collective of the step: whoever reads it knows that everybody has its gradients (rule 3).
    parts = t.compared if t.seat.compares(step) else ()
    ballot = _ballot(t, step, training, validation)
    ballot += checksums(parts, t.me, lambda part: part_checksum(t.memory.state, part))
    if t.seat.measures(step):
        ballot += timing.slots(t.world, t.meter.timing())
    t.faults.fire("before_vote", step)
    t.progress.enter("vote")
    t.seat.prepare(t.world.generation, step)
    summed, told = timing.split(t.world, step, _cast(t, ballot))
    vote = read_vote(t.world.generation, step, summed, parts)
    if not t.seat.see(vote, told):
        raise DivergedError(f"copies of step {step - 1} differ") if t.seat.diverged else AbortedError
    t.faults.fire("after_vote", step)
    return vote


def commit(memory: Memory, settings: Settings, vote: Vote, seat: Seat, faults: Faults) -> Reported | None:
    """4. Commit: the optimizer step, local. Whatever is raised in here leaves a torn state (rule 8).

    Returns:
        The leader's report, to be sent.
    """
    seat.begin_commit()
    faults.fire("commit", vote.step)
    if vote.grad_norm is not None:
        rate = rate_of(settings, vote.step)
        memory.optimizer.step(vote.step, rate, gradient_scale(vote.weight, vote.grad_norm, settings.grad_clip))
    if memory.device.type == "cuda":
        torch.cuda.synchronize(memory.device)
    return seat.end_commit(time.time())


def rate_of(settings: Settings, step: int) -> float:
    """The learning rate of a step."""
    return learning_rate(
        step,
        peak=settings.learning_rate,
        warmup=settings.warmup_steps,
        last=settings.last_step,
        schedule=settings.schedule,
    )


def _ballot(t: Training, step: int, training: Sums, validation: Sums) -> list[float]:
    """This worker's part of the vote. What is not finite is counted, and adds nothing to the sums (rule 12)."""
    squares = t.sums.squares()
    finite = math.isfinite(squares) and math.isfinite(training.loss)
    if not finite:
        t.send(NotFinite(t.me, step, _what(t, training.loss)))
    ballot = [0.0] * SLOTS
    ballot[Slot.ONES] = 1.0
    ballot[Slot.STEP] = step
    ballot[Slot.GRAD_SQUARES] = squares if finite else 0.0
    ballot[Slot.TOKENS] = training.tokens if finite else 0.0
    ballot[Slot.LOSS] = training.loss if finite else 0.0
    ballot[Slot.NONFINITE] = 0.0 if finite else 1.0
    put_flags(ballot, t.seat.flags(step))
    t.mirrors.check(t.groups)
    ballot[Slot.MIRRORING] = float(t.seat.mirroring())
    ballot[Slot.BUSY] = float(t.seat.busy(step, t.saver.busy))
    if math.isfinite(validation.loss):
        ballot[Slot.EVAL_TOKENS] = validation.tokens
        ballot[Slot.EVAL_LOSS] = validation.loss
    return ballot


def _what(t: Training, loss: float) -> str:
    """What is not finite here, because the vote only counts who met it."""
    state = t.memory.state
    bad = [name for name in state.boxes if not bool(state.grad(name).isfinite().all())]
    gradients = f"the gradients of {', '.join(bad[:4])}" + (f" and {len(bad) - 4} more" if len(bad) > 4 else "")
    found = ([] if math.isfinite(loss) else ["the loss"]) + ([gradients] if bad else [])
    return f"{' and '.join(found) or 'a norm'} that {'is' if found == ['the loss'] or not found else 'are'} not finite"


def _cast(t: Training, ballot: list[float]) -> tuple[float, ...]:
    """Sums the ballots over the world and reads the result back to the host (rule 2)."""
    summed = torch.tensor(ballot, dtype=torch.float64, device=t.memory.device)
    with t.progress.communicating():
        t.groups.world.all_reduce(summed)
    return tuple(summed.tolist())
