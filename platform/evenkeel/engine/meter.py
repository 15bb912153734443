"""What a worker measures of its steps: its passes, without what it waits for, and what comes in from whom how fast.

On a GPU the times are those of events on its stream, read after the step is through: nothing waits for the device. On
the CPU they are processor time of the training thread, which stands still where that waits. Workers share cores there,
with each other and with what else runs: the clock on the wall would tell of the neighbours more than of the worker.
"""

import time
from collections import defaultdict
from collections.abc import Sequence
from statistics import median

import torch

from evenkeel.core.ids import WorkerId
from evenkeel.core.vote import Timing
from evenkeel.engine.groups import GroupSet

Mark = float | torch.cuda.Event


class Meter:
    """Measures from one vote that tells to the next; see core.vote.Timing.

    Args:
        layers: of the worker's stage (start, stop).
        tells_layers: whether it is the one of its TP group that does.
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
        self._forwards: list[tuple[Mark, Mark]] = []
        self._backwards: list[tuple[Mark, Mark]] = []
        self._parts: list[tuple[int, Mark, Mark]] = []
        self._at: tuple[int, Mark] | None = None
        self._on = self._detailed = False

    def begin(self, on: bool, detailed: bool) -> None:
        """The passes of a training step begin.

        Args:
            on: whether it is measured; the first one of a generation is not, it is slow for reasons of its own.
            detailed: layer by layer too.
        """
        self._on, self._detailed, self._at = on, detailed and self._tells_layers, None

    def end(self) -> None:
        """They are through; those of a validation do not count."""
        self._on = self._detailed = False

    def now(self) -> Mark:
        """This moment, on a clock that stands still while the worker waits for others; see above."""
        if not self._on:
            return 0.0
        if not self._on_gpu:
            return time.thread_time()
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event

    def forward(self, began: Mark) -> None:
        """A forward pass that began then is through."""
        if self._on:
            self._forwards.append((began, self.now()))

    def backward(self, began: Mark) -> None:
        """A backward pass that began then is through."""
        if self._on:
            self._backwards.append((began, self.now()))

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
        forwards, backwards = _seconds(self._forwards), _seconds(self._backwards)
        pass_s = median(forwards) + median(backwards) if forwards and backwards else 0.0
        layers = self._by_layer(pass_s)
        receive_s, source, rate = self._received(len(forwards))
        self._forwards, self._backwards, self._parts = [], [], []
        return Timing(self._worker, pass_s, receive_s, layers, source, rate)

    def _by_layer(self, pass_s: float) -> tuple[float, ...]:
        start, stop = self._layers
        took = dict.fromkeys(range(start, stop), 0.0)
        for layer, began, ended in self._parts:
            took[layer] += sum(_seconds([(began, ended)]))
        whole = sum(took.values())
        return tuple(pass_s * seconds / whole for seconds in took.values()) if whole > 0 and pass_s > 0 else ()

    def _received(self, micros: int) -> tuple[float, WorkerId | None, float]:
        """Seconds per micro-batch in which stages' messages came in; the slowest source, and its bytes per second."""
        sizes: dict[WorkerId, int] = defaultdict(int)
        times: dict[WorkerId, float] = defaultdict(float)
        messages_s = 0.0
        for source, count, seconds, of_stages in self._groups.received():
            sizes[source] += count
            times[source] += seconds
            messages_s += seconds if of_stages else 0.0
        rates = [(sizes[source] / seconds, source) for source, seconds in times.items() if seconds > 0]
        rate, slowest = min(rates, default=(0.0, None))
        return (messages_s / micros if micros else 0.0), slowest, rate


def _seconds(spans: Sequence[tuple[Mark, Mark]]) -> list[float]:
    found = []
    for began, ended in spans:
        if isinstance(began, float) and isinstance(ended, float):
            found.append(ended - began)
        elif isinstance(began, torch.cuda.Event) and isinstance(ended, torch.cuda.Event) and _is_through(ended):
            found.append(began.elapsed_time(ended) / 1000)
    return found


def _is_through(event: torch.cuda.Event) -> bool:
    return bool(event.query())  # type: ignore[no-untyped-call]
