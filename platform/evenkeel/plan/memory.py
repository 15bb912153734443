"""How much memory the training state takes on a worker, and how many copies of it fit."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from evenkeel.core.ids import WorkerId
from evenkeel.core.layout import Layout, WorkerInfo
from evenkeel.core.model import ModelShape, Shard
from evenkeel.plan.copies import place_copies, shards
from evenkeel.plan.flat import ALIGNMENT, flat_places

FOR_STATE = 0.8
"""Of a device's memory; the rest is for activations, what is communicated, and the allocator's waste."""


@dataclass(frozen=True, slots=True)
class Widths:
    """Bytes per element of parameters to compute with, of gradients, and of what an owner keeps for the optimizer."""

    params: int
    grads: int
    optimizer: int


WIDTHS = {"fp32": Widths(4, 4, 8), "bf16": Widths(2, 4, 12), "fp64": Widths(8, 8, 16)}
"""By train.precision. The optimizer keeps two moments, under bf16 also the float32 parameters."""


@dataclass(frozen=True, slots=True)
class StateBytes:
    """Bytes of the state on one worker; only the optimizer's part depends on how many copies there are."""

    params: int
    grads: int
    optimizer: int

    @property
    def total(self) -> int:
        return self.params + self.grads + self.optimizer


def state_bytes(model: ModelShape, shard: Shard, precision: str) -> StateBytes:
    """What the buffers of a shard take up, gaps for alignment included.

    Args:
        precision: "fp32", "bf16" or "fp64".
    """
    places = flat_places(model, shard, ALIGNMENT)
    size = places[-1].stop if places else 0
    owned = size if shard.owned is None else sum(stop - start for start, stop in shard.owned)
    width = WIDTHS[precision]
    return StateBytes(width.params * size, width.grads * size, width.optimizer * owned)


def copies_that_fit(
    layout: Layout, model: ModelShape, members: Iterable[WorkerInfo], precision: str
) -> tuple[int | None, str]:
    """The largest number of copies for which every member's state fits into its memory, and why not more.

    Workers on the CPU share their node's memory. Of a worker whose memory is not known anything fits.

    Returns:
        None, "" where all who hold a parameter can keep its state.
    """
    infos = tuple(members)
    room = _room(infos)
    node_of = {info.worker_id: info.node_id for info in infos}
    most = len(layout.pipelines)
    short = ""
    for copies in range(most, 0, -1):
        if copies == most:
            held: Mapping[WorkerId, Shard] = {worker: layout.shard(worker) for worker in layout.members}
        else:
            held = shards(place_copies(layout, model, copies, node_of), layout, model)
        takes = {shard: state_bytes(model, shard, precision).total for shard in dict.fromkeys(held.values())}
        worst = max(layout.members, key=lambda w: takes[held[w]] / room[w] if room[w] else 0.0)
        if not room[worst] or takes[held[worst]] <= room[worst]:
            return (None, "") if copies == most else (copies, f"{copies} copies of the optimizer state, as {short}")
        needs, has = takes[held[worst]] / 2**30, room[worst] / 2**30
        short = f"with {copies} the state takes {needs:.1f} GiB on {worst}, which has room for {has:.1f}"
    return 1, f"1 copy of the optimizer state, though even {short}"


def _room(infos: tuple[WorkerInfo, ...]) -> Mapping[WorkerId, float]:
    """Bytes for the state, by worker; 0 where that is not known."""
    on_cpu = [info.node_id for info in infos if info.device == "cpu"]
    return {
        info.worker_id: FOR_STATE * info.memory / (on_cpu.count(info.node_id) if info.device == "cpu" else 1)
        for info in infos
    }
