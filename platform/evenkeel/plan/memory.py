"""How much memory the training state takes on a worker, and how many copies of it fit."""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from evenkeel.core.ids import NodeId, WorkerId
from evenkeel.core.layout import Layout, Stage, WorkerInfo
from evenkeel.core.model import ModelShape, Shard
from evenkeel.plan.copies import Copies, place_copies, shards
from evenkeel.plan.flat import ALIGNMENT, flat_places
from evenkeel.plan.mirrors import are_needed, keepers_of
from evenkeel.plan.speeds import Fits, anything
from evenkeel.plan.state import KINDS
from evenkeel.plan.writers import ranges_written

FOR_STATE = 0.8
"""Of a device's memory; the rest is for activations, what is communicated, and the allocator's waste."""


@dataclass(frozen=True, slots=True)
class Widths:
    """Bytes per element of parameters to compute with, of gradients, and of what an owner keeps for the optimizer."""

    params: int
    grads: int
    optimizer: int
    state: int
    """Of each of KINDS, as it is kept, saved and mirrored."""


WIDTHS = {"fp32": Widths(4, 4, 8, 4), "bf16": Widths(2, 4, 12, 4), "fp64": Widths(8, 8, 16, 8)}
"""By train.precision. The optimizer keeps two moments, under bf16 also the float32 parameters."""

MIRRORED_VERSIONS = 2


@dataclass(frozen=True, slots=True)
class StateBytes:
    """Bytes of the state on one worker; only the optimizer's part depends on how many copies there are."""

    params: int
    grads: int
    optimizer: int

    @property
    def total(self) -> int:
        return self.params + self.grads + self.optimizer


@dataclass(frozen=True, slots=True)
class Uses:
    """What a run keeps in host memory beside the state: which on the CPU is the same memory.

    Attributes:
        saves: each worker has a buffer for the part that it writes of a checkpoint.
        mirrors: where they are needed, each has two versions of its own part and of those that it keeps for others.
    """

    saves: bool = False
    mirrors: bool = False


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


def host_bytes(
    layout: Layout, model: ModelShape, ownership: Copies, precision: str, uses: Uses
) -> Mapping[WorkerId, int]:
    """What each member keeps in host memory beside its state.

    Args:
        ownership: of the layout, as place_copies gives it.
        uses: `mirrors` is taken as it is, whether they are needed or not.
    """
    each = len(KINDS) * WIDTHS[precision].state
    written = ranges_written(ownership, layout, model)
    parts = {worker: each * sum(stop - start for start, stop in ranges) for worker, ranges in written.items()}
    kept = dict.fromkeys(layout.members, 0)
    if uses.mirrors:
        for worker, keeper in keepers_of(layout.members, ownership.node_of).items():
            kept[worker] += MIRRORED_VERSIONS * parts[worker]
            kept[keeper] += MIRRORED_VERSIONS * parts[worker]
    return {worker: kept[worker] + (parts[worker] if uses.saves else 0) for worker in layout.members}


def copies_that_fit(
    layout: Layout, model: ModelShape, members: Iterable[WorkerInfo], precision: str, uses: Uses
) -> tuple[int | None, str]:
    """The largest number of copies for which every member's state fits into its memory, and why not more.

    Workers on the CPU share their node's memory, and there what `uses` says counts, too. Of a worker whose memory is
    not known anything fits. If no number fits it is the one that comes nearest: with mirrors that need not be 1, which
    is the only one that needs any.

    Returns:
        None, "" where all who hold a parameter can keep its state.
    """
    infos = tuple(members)
    if not any(info.memory for info in infos):
        return None, ""
    room = _room(infos)
    node_of = {info.worker_id: info.node_id for info in infos}
    on_cpu = {info.worker_id for info in infos if info.device == "cpu"}
    most = len(layout.pipelines)
    short = ""
    nearest: tuple[float, int, str] | None = None
    for copies in range(most, 0, -1):
        takes = _takes(layout, model, copies, node_of, precision, uses, on_cpu)
        full = {worker: takes[worker] / room[worker] if room[worker] else 0.0 for worker in layout.members}
        worst = max(layout.members, key=lambda w: full[w])
        if full[worst] <= 1:
            return (None, "") if copies == most else (copies, f"{_count(copies)}, as {short}")
        needs, has = takes[worst] / 2**30, room[worst] / 2**30
        short = f"with {copies} the state takes {needs:.1f} GiB on {worst}, which has room for {has:.1f}"
        if nearest is None or full[worst] <= nearest[0]:
            nearest = full[worst], copies, short
    assert nearest is not None
    return nearest[1], f"{_count(nearest[1])}, though even {nearest[2]}"


def fits(
    layout: Layout, model: ModelShape, members: Iterable[WorkerInfo], precision: str, uses: Uses, copies: int | None
) -> bool:
    """Whether every member has room for its state with so many copies, or with as many as fit if that is None."""
    infos = tuple(members)
    room = _room(infos)
    most = len(layout.pipelines)
    if copies is None:
        copies = copies_that_fit(layout, model, infos, precision, uses)[0]
    node_of = {info.worker_id: info.node_id for info in infos}
    on_cpu = {info.worker_id for info in infos if info.device == "cpu"}
    if not any(room.values()):
        return True
    takes = _takes(layout, model, min(copies or most, most), node_of, precision, uses, on_cpu)
    return all(takes[worker] <= room[worker] for worker in layout.members if room[worker])


def stage_fits(
    layout: Layout, model: ModelShape, members: Iterable[WorkerInfo], precision: str, copies: int | None
) -> Fits:
    """A first look, cheap and never too strict: whether stage j of pipeline i has room for layers start to stop.

    Args:
        copies: how many there are to be; None: one, as fewer are never kept.

    Returns:
        A function of i, j, start and stop; `anything` where no device's memory is known.
    """
    infos = tuple(members)
    if not any(info.memory for info in infos):
        return anything
    room = _room(infos)
    kept = min(copies or 1, len(layout.pipelines)) / len(layout.pipelines)
    least = {stage.members: min((room[w] for w in stage.members if room[w]), default=0.0) for stage in _stages(layout)}
    sizes: dict[tuple[int, int], float] = {}

    def fit(pipeline: int, stage: int, start: int, stop: int) -> bool:
        has = least[layout.pipelines[pipeline].stages[stage].members]
        if has and (start, stop) not in sizes:
            state = state_bytes(model, Shard(start, stop, 0, layout.tensor), precision)
            sizes[start, stop] = state.params + state.grads + kept * state.optimizer
        return not has or sizes[start, stop] <= has

    return fit


def _stages(layout: Layout) -> Iterable[Stage]:
    return (stage for pipeline in layout.pipelines for stage in pipeline.stages)


def _takes(
    layout: Layout,
    model: ModelShape,
    copies: int,
    node_of: Mapping[WorkerId, NodeId],
    precision: str,
    uses: Uses,
    on_cpu: set[WorkerId],
) -> Mapping[WorkerId, int]:
    """Bytes by worker, with so many copies."""
    everywhere = copies == len(layout.pipelines)
    ownership = place_copies(layout, model, 1 if everywhere else copies, node_of)  # see copies_of
    whole = {worker: layout.shard(worker) for worker in layout.members}
    held: Mapping[WorkerId, Shard] = whole if everywhere else shards(ownership, layout, model)
    states = {shard: state_bytes(model, shard, precision).total for shard in dict.fromkeys(held.values())}
    mirrored = uses.mirrors and are_needed(layout, None if everywhere else copies)
    beside = host_bytes(layout, model, ownership, precision, Uses(uses.saves, mirrored)) if on_cpu else {}
    return {w: states[held[w]] + (beside[w] if w in on_cpu else 0) for w in layout.members}


def _count(copies: int) -> str:
    return f"{copies} {'copy' if copies == 1 else 'copies'} of the optimizer state"


def _room(infos: tuple[WorkerInfo, ...]) -> Mapping[WorkerId, float]:
    """Bytes for the state, by worker; 0 where that is not known."""
    sharing = Counter(info.node_id for info in infos if info.device == "cpu")
    return {
        info.worker_id: FOR_STATE * info.memory / (sharing[info.node_id] if info.device == "cpu" else 1)
        for info in infos
    }
