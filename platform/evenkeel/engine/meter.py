"""What a worker measures of its steps: its passes, without what it waits for, and what comes in from whom how fast.

A pass counts by its work: a micro-batch of longer sequences takes longer, and that makes nobody slow.

On a GPU the times are those of events on its stream, read after the step is through: nothing waits for the device. On
the CPU they are processor time of the training thread, which stands still where that waits. Workers share cores there,
with each other and with what else runs: the clock on the wall would tell of the neighbours more than of the worker.
"""

import time
from collections.abc import Sequence
from statistics import median

import torch

from evenkeel.core.ids import WorkerId
from evenkeel.core.vote import Timing
from evenkeel.engine.groups import GroupSet

Mark = float | torch.cuda.Event
Pass = tuple[Mark, Mark, float]
"""When it began and ended, and its work."""


class Meter:
    """Measures from one vote that tells to the next; see core.vote.Timing.

    Args:
        layers: of the worker's stage (start, stop).
        tells_layers: whether it is the one of its TP group that does.

    Attributes:
        on: whether the passes that run are measured.
        work: of the micro-batch whose forward pass runs: the elements of its inputs over Job.usual_work.
    """

    def __init__(
        self,
        worker: WorkerId,
        layers: tuple[int, int],
        tells_layers: bool,
        device: torch.device,
        groups: GroupSet,
    ) -> None:
        self._worker, self._layers, self._tells_layers = worker, layers, tells_layers
        self._on_gpu = device.type == "cuda"
        self._groups = groups
        self.work = 1.0
        self._forwards: list[Pass] = []
        self._backwards: list[Pass] = []
        self._parts: list[tuple[int, Mark, Mark]] = []
        self._at: tuple[int, Mark] | None = None
        self.on = self._detailed = False

    def begin(self, on: bool, detailed: bool) -> None:
        """The passes of a training step begin.

        Args:
            on: whether it is measured; the first one of a generation is not, it is slow for reasons of its own.
            detailed: layer by layer too.
        """
        self.on, self._detailed, self._at = on, detailed and self._tells_layers, None

    def end(self) -> None:
        """They are through; those of a validation do not count."""
        self.on = self._detailed = False

    def now(self) -> Mark:
        """This moment, on a clock that stands still while the worker waits for others; see above."""
        if not self.on:
            return 0.0
        if not self._on_gpu:
            return time.thread_time()
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event

    def forward(self, began: Mark) -> None:
        """A forward pass that began then is through."""
        if self.on:
            self._forwards.append((began, self.now(), self.work))

    def backward(self, began: Mark) -> None:
        """A backward pass that began then is through. They come in the order of the forward passes."""
        if self.on:
            *_, work = self._forwards[len(self._backwards)]
            self._backwards.append((began, self.now(), work))

    def at(self, layer: int) -> None:
        """A layer's code begins to run, forward or backward; -1: none does any more."""
        if not self._detailed:
            return
        now = self.now()
        if self._at is not None:
            self._parts.append((*self._at, now))
        self._at = (layer, now) if layer >= 0 else None

    def timing(self) -> Timing:
        """What was measured since it was told last. After the device is through with it."""
        forwards, backwards = _by_work(self._forwards), _by_work(self._backwards)
        pass_s = median(forwards) + median(backwards) if forwards and backwards else 0.0
        layers = self._by_layer(pass_s)
        receive_s, source, rate = self._received()
        self._forwards, self._backwards, self._parts = [], [], []
        return Timing(self._worker, pass_s, receive_s, layers, source, rate)

    def _by_layer(self, pass_s: float) -> tuple[float, ...]:
        start, stop = self._layers
        took = dict.fromkeys(range(start, stop), 0.0)
        for layer, began, ended in self._parts:
            took[layer] += _seconds(began, ended) or 0.0
        whole = sum(took.values())
        return tuple(pass_s * seconds / whole for seconds in took.values()) if whole > 0 and pass_s > 0 else ()

    def _received(self) -> tuple[float, WorkerId | None, float]:
        """Seconds per micro-batch in which stages' messages came in, one from each neighbour; the slowest source, and
        its bytes per second.

        Of the times the median, of the rates the best one: single messages also come late where a process waited for
        its core, but what a link can carry shows in its fastest.
        """
        messages_s = 0.0
        rates: dict[WorkerId, float] = {}
        for source, messages, of_stages in self._groups.received():
            messages_s += median(seconds for _, seconds in messages) if of_stages else 0.0
            found = [count / seconds for count, seconds in messages if seconds > 0]
            if found:
                rates[source] = max(rates.get(source, 0.0), *found)
        rate, slowest = min(((rate, source) for source, rate in rates.items()), default=(0.0, None))
        return messages_s, slowest, rate


def _by_work(passes: Sequence[Pass]) -> list[float]:
    """Seconds that each would have taken of a usual micro-batch; of those that the device is through with."""
    taken = ((_seconds(began, ended), work) for began, ended, work in passes if work > 0)
    return [seconds / work for seconds, work in taken if seconds is not None]


def _seconds(began: Mark, ended: Mark) -> float | None:
    """Between two marks; None if the device has not come to the second one."""
    if isinstance(began, torch.cuda.Event) and isinstance(ended, torch.cuda.Event):
        return began.elapsed_time(ended) / 1000 if ended.query() else None  # type: ignore[no-untyped-call]
    assert isinstance(began, float) and isinstance(ended, float)
    return ended - began
