"""Executes one stage's list of passes (plan/schedule.py): receive, compute, send, micro-batch by micro-batch."""

from collections import deque
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from evenkeel.engine.faults import Faults
from evenkeel.engine.groups import Pending
from evenkeel.engine.meter import Meter
from evenkeel.engine.model import Hidden
from evenkeel.engine.progress import Progress
from evenkeel.engine.slowdown import Slowdown
from evenkeel.plan.schedule import Action, Kind


class Links(Protocol):
    """Messages to and from the other stages of the pipeline, by rank = stage; see groups.Group."""

    def isend(self, tensor: Tensor, dst: int) -> Pending: ...

    def irecv(self, tensor: Tensor, src: int) -> Pending: ...


class StageCompute(Protocol):
    """What a stage computes."""

    def forward(self, micro: int, hidden: Tensor | None) -> Tensor:
        """Activations for the next stage, or in the last one the summed loss of the micro-batch.

        Args:
            micro: counts from 0 within the pipeline's share.
            hidden: what the stage before gave; None in the first one.
        """


@dataclass(frozen=True, slots=True)
class Boundary:
    """What stages hand on: activations one way, their gradients the other."""

    hidden: Hidden
    device: torch.device

    @property
    def has_gradient(self) -> bool:
        """Whole numbers, such as a layer of the user's may hand on, have none."""
        return self.hidden.dtype.is_floating_point

    def empty(self) -> Tensor:
        return torch.empty(self.hidden.shape, dtype=self.hidden.dtype, device=self.device)


class _Inbox:
    """Receives the messages of one direction in order; each receive is posted before it is asked for.

    A buffer is written again after as many further messages as there are buffers; what was taken must be used up then.
    """

    def __init__(self, links: Links, source: int, boundary: Boundary, buffers: int) -> None:
        self._links, self._source = links, source
        self._buffers = deque(boundary.empty() for _ in range(buffers))
        self._posted: deque[tuple[Pending, Tensor]] = deque()
        self._left = 0

    def expect(self, count: int) -> None:
        """So many messages will come in this run; the receive of the first is posted."""
        self._posted.clear()
        self._left = count
        self._post()

    def take(self, waiting: AbstractContextManager[None]) -> Tensor:
        """The next message; the receive of the one after it is posted before this one is used."""
        handle, buffer = self._posted.popleft()
        with waiting:
            handle.wait()
        self._post()
        return buffer

    def _post(self) -> None:
        if self._left:
            self._left -= 1
            self._buffers.rotate(-1)
            buffer = self._buffers[-1]
            self._posted.append((self._links.irecv(buffer, self._source), buffer))


class Executor:
    """Runs the passes of one stage.

    In 1F1B at most `stages - stage` micro-batches are in flight here, and one more activation is on its way in.

    Args:
        actions: the stage's passes, in order.
        links: None for a pipeline of one stage.
        entry: what comes in from the stage before (in the first one not used).
        exit_: what goes on to the stage after; None in the last one.
        meter: told of every pass of a training step.
        before_last: called before the last backward pass: after it all gradients are final.
        slowdown: makes each pass take longer.
    """

    def __init__(
        self,
        stage: int,
        stages: int,
        actions: Sequence[Action],
        compute: StageCompute,
        links: Links | None,
        entry: Boundary,
        exit_: Boundary | None,
        progress: Progress,
        faults: Faults,
        *,
        meter: Meter | None = None,
        before_last: Callable[[], None] = lambda: None,
        slowdown: Slowdown | None = None,
    ) -> None:
        self.first, self.last = stage == 0, stage == stages - 1
        self._stage, self._stages = stage, stages
        self._actions = actions
        self._forwards = sum(action.kind is Kind.FORWARD for action in actions)
        self._compute = compute
        self._links = links
        self._device = entry.device
        self._progress = progress
        self._faults = faults
        self._meter = meter
        self._before_last = before_last
        self._slowdown = slowdown or Slowdown()
        self._flight: dict[int, tuple[Tensor | None, Tensor]] = {}
        self._sent: deque[tuple[Pending, Tensor]] = deque()
        flights = _most_in_flight(actions)
        self._activations = self._inbox(stage - 1, entry, flights + 1) if not self.first else None
        self._gradients = self._inbox(stage + 1, exit_, 2) if exit_ is not None and exit_.has_gradient else None
        self._returns = not self.first and entry.has_gradient
        self._loss = torch.zeros((), dtype=torch.float64, device=self._device)

    def run(self) -> Tensor:
        """All passes of one step; gradients add to what the parameters have.

        Returns:
            The loss summed over the micro-batches in float64, detached; 0 in every stage but the last.

        Raises:
            AbortedError: between two passes, once the generation is aborted.
        """
        self._begin(self._forwards)
        for index, action in enumerate(self._actions):
            self._progress.enter(action.kind.value, action.micro)
            if action.kind is Kind.FORWARD:
                self._forward(action.micro, keep=True)
            else:
                if index == len(self._actions) - 1:
                    self._before_last()
                self._backward(action.micro)
        return self._end()

    @torch.no_grad()
    def evaluate(self) -> Tensor:
        """Only the forward passes of the list; returns what `run` does."""
        self._begin(0)
        for action in self._actions:
            if action.kind is Kind.FORWARD:
                self._progress.enter("forward", action.micro)
                self._forward(action.micro, keep=False)
        return self._end()

    # ------------------------------------------------------------ one pass

    def _begin(self, backwards: int) -> None:
        self._flight.clear()
        self._sent.clear()
        self._loss.zero_()
        if self._activations is not None:
            self._activations.expect(self._forwards)
        if self._gradients is not None:
            self._gradients.expect(backwards)

    def _end(self) -> Tensor:
        while self._sent:
            self._reap()
        return self._loss

    def _forward(self, micro: int, keep: bool) -> None:
        hidden = None
        if self._activations is not None:
            hidden = self._activations.take(self._progress.communicating()).detach()
            hidden.requires_grad_(keep and self._returns)
        mark = self._meter.now() if self._meter is not None else None
        self._faults.fire("forward", self._progress.step)
        began = self._slowdown.begin()
        output = self._compute.forward(micro, hidden)
        self._slowdown.end(began, self._progress.step)
        if keep and self._meter is not None and mark is not None:
            self._meter.forward(mark)
        if self.last:
            self._loss += output.detach()
        else:
            self._send(output.detach(), self._stage + 1)
        if keep:
            self._flight[micro] = (hidden, output)

    def _backward(self, micro: int) -> None:
        hidden, output = self._flight.pop(micro)
        gradient = None if self._gradients is None else self._gradients.take(self._progress.communicating())
        mark = self._meter.now() if self._meter is not None else None
        self._faults.fire("backward", self._progress.step)
        began = self._slowdown.begin()
        if output.requires_grad:  # not in a first stage without parameters
            root = output if gradient is None else Weighted.apply(output, gradient)  # type: ignore[no-untyped-call]
            torch.autograd.backward((root,))
        self._progress.layer = -1
        if self._meter is not None:
            self._meter.at(-1)
        self._slowdown.end(began, self._progress.step)
        if self._meter is not None and mark is not None:
            self._meter.backward(mark)
        if self._returns:
            assert hidden is not None
            self._send(torch.zeros_like(hidden) if hidden.grad is None else hidden.grad, self._stage - 1)

    # ------------------------------------------------------------ small parts

    def _inbox(self, source: int, boundary: Boundary, buffers: int) -> _Inbox:
        assert self._links is not None
        return _Inbox(self._links, source, boundary, buffers)

    def _send(self, tensor: Tensor, to: int) -> None:
        """Never waits for this message, only for one so much older that its receiver gets to it without us."""
        assert self._links is not None
        self._sent.append((self._links.isend(tensor.contiguous(), to), tensor))
        if len(self._sent) > 2 * self._stages + 2:
            self._reap()

    def _reap(self) -> None:
        handle, _ = self._sent.popleft()
        with self._progress.communicating():
            handle.wait()


class Weighted(torch.autograd.Function):
    """A scalar whose gradient with respect to `output` is `gradient`, to begin a backward pass with.

    Handing the gradient to torch.autograd.backward makes torch 2.13 import its compiler to compare two shapes: 1 to 2 s
    in a new worker's first step, while all others wait for it.
    """

    @staticmethod
    def forward(ctx: Any, output: Tensor, gradient: Tensor) -> Tensor:
        ctx.gradient = gradient
        return output.new_zeros(())

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple[Tensor, None]:
        return ctx.gradient, None


def _most_in_flight(actions: Sequence[Action]) -> int:
    """The most micro-batches whose backward pass is still to come, at least 1; where there are none, 1."""
    most = now = 0
    for action in actions:
        now += 1 if action.kind is Kind.FORWARD else -1
        most = max(most, now)
    return most if now == 0 and most else 1
