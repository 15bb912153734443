"""Who sends which slice to whom, so that everybody holds what the new layout wants of them.

Recovery from a peer, joining workers, moved layers and loading a checkpoint are all this one function: what is
wanted, against what is held (of one version; the caller leaves out holders of any other).
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from heapq import heapify, heapreplace

from evenkeel.core.boxes import Box
from evenkeel.core.ids import NodeId, WorkerId
from evenkeel.core.layout import Layout
from evenkeel.core.model import ModelShape, Shard
from evenkeel.plan.state import Slice, slices


@dataclass(frozen=True, slots=True, order=True)
class Transfer:
    """`source` sends the box of the tensor to `target`."""

    source: WorkerId
    target: WorkerId
    tensor: str
    box: Box


@dataclass(frozen=True, slots=True, order=True)
class Missing:
    """A part of what `target` wants that nobody holds."""

    target: WorkerId
    tensor: str
    box: Box


@dataclass(frozen=True, slots=True)
class Resharding:
    """Kept, transferred and missing boxes together cover each wanted box exactly once.

    Attributes:
        kept: per worker that wants anything, what it has in its own memory.
        transfers: in the one order in which everybody carries them out.
        missing: empty, or the state cannot be had from these holders.
    """

    kept: Mapping[WorkerId, tuple[Slice, ...]]
    transfers: tuple[Transfer, ...]
    missing: tuple[Missing, ...]

    @property
    def lost(self) -> tuple[Slice, ...]:
        """What is missing, each slice once however many want it."""
        return tuple(dict.fromkeys(Slice(m.tensor, m.box) for m in self.missing))


def reshard(
    wants: Mapping[WorkerId, Sequence[Slice]],
    holds: Mapping[WorkerId, Sequence[Slice]],
    node_of: Mapping[WorkerId, NodeId],
) -> Resharding:
    """Finds a source for each wanted slice: the worker's own memory, else a holder on its node, else any holder.

    Among equals the one that has the fewest elements to send so far is taken, so that the load spreads evenly. A
    slice may be pieced together from several holders. The result depends on nothing but the values: not on the
    order of the mappings, which need not be the same in the processes that compute it.

    Many workers may share one sequence object; then it is looked at once, which is what makes thousands quick.

    Args:
        wants: the slices of one worker are covered each for itself, so they should not overlap.
        holds: slices of one worker may overlap.
        node_of: of everybody in `wants` and `holds`.
    """
    by_object: dict[int, _Group] = {}
    by_value: dict[tuple[Slice, ...], _Group] = {}
    for worker in sorted(holds):
        held = holds[worker]
        if id(held) not in by_object:
            by_object[id(held)] = by_value.setdefault(tuple(held), _Group(held))
        by_object[id(held)].workers.append(worker)
    own = {worker: (by_object[id(held)],) for worker, held in holds.items()}
    return _solve(sorted(wants.items()), own, list(by_value.values()), node_of)


def transfers(
    model: ModelShape,
    sources: Sequence[tuple[WorkerId, Shard]],
    layout: Layout,
    node_of: Mapping[WorkerId, NodeId],
    shards: Mapping[WorkerId, Shard] | None = None,
) -> Resharding:
    """What moves when workers that hold `sources` are to form `layout`; see `reshard`.

    Args:
        sources: true holders of the version that training goes on from; a worker that holds two shards is there twice.
        node_of: of all sources and members.
        shards: what each member is to hold; None: all that its place has.
    """
    groups: dict[Shard, _Group] = {}
    own: dict[WorkerId, tuple[_Group, ...]] = {}
    for worker, shard in sorted(set(sources), key=_order):
        if shard not in groups:
            groups[shard] = _Group(slices(model, shard))
        groups[shard].workers.append(worker)
        own[worker] = (*own.get(worker, ()), groups[shard])
    wanted: dict[Shard, Sequence[Slice]] = {shard: group.held for shard, group in groups.items()}
    wants: list[tuple[WorkerId, Sequence[Slice]]] = []
    for worker in sorted(layout.members):
        shard = layout.shard(worker) if shards is None else shards[worker]
        if shard not in wanted:
            wanted[shard] = slices(model, shard)
        wants.append((worker, wanted[shard]))
    return _solve(wants, own, list(groups.values()), node_of)


def _order(source: tuple[WorkerId, Shard]) -> tuple[object, ...]:
    worker, shard = source
    return worker, shard.start, shard.stop, shard.part, shard.parts, shard.owned or ()


class _Group:
    """Workers that hold the same slices, with heaps that give the one with the least to send, of all or of a node."""

    def __init__(self, held: Sequence[Slice]) -> None:
        self.held = held
        self.workers: list[WorkerId] = []
        self._boxes: dict[str, list[Box]] = {}
        self._heaps: dict[NodeId | None, list[tuple[int, WorkerId]]] = {}

    def boxes(self, tensor: str) -> Sequence[Box]:
        if not self._boxes:
            for piece in self.held:
                self._boxes.setdefault(piece.tensor, []).append(piece.box)
        return self._boxes.get(tensor, ())

    def least_loaded(
        self, node: NodeId | None, load: Mapping[WorkerId, int], node_of: Mapping[WorkerId, NodeId]
    ) -> tuple[int, WorkerId] | None:
        """The least (load, worker) on `node`, or of all if it is None; None if the group has nobody there."""
        if not self._heaps:
            for worker in self.workers:
                entry = (load.get(worker, 0), worker)
                self._heaps.setdefault(node_of[worker], []).append(entry)
                self._heaps.setdefault(None, []).append(entry)
            for heap in self._heaps.values():
                heapify(heap)
        heap = self._heaps.get(node, [])
        # Loads only grow, so an entry that is out of date is too low and comes up before its turn.
        while heap and heap[0][0] != load.get(heap[0][1], 0):
            heapreplace(heap, (load[heap[0][1]], heap[0][1]))
        return heap[0] if heap else None


class _Sources:
    """All holders, and how many elements each has been asked to send."""

    def __init__(self, groups: Sequence[_Group], node_of: Mapping[WorkerId, NodeId]) -> None:
        self._groups = groups
        self._node_of = node_of
        self._load: dict[WorkerId, int] = {}
        self._holders: dict[str, list[tuple[_Group, Box]]] = {}

    def send(self, tensor: str, wanted: Box, node: NodeId | None) -> tuple[WorkerId, Box] | None:
        """Asks somebody on `node` (None: anywhere) for as much of `wanted` as it has; None if nobody has any of it."""
        if tensor not in self._holders:
            self._holders[tensor] = [(group, box) for group in self._groups for box in group.boxes(tensor)]
        found: list[tuple[int, int, WorkerId, Box]] = []
        for group, box in self._holders[tensor]:
            common = box.intersect(wanted)
            least = group.least_loaded(node, self._load, self._node_of) if common else None
            if common and least:
                found.append((least[0], -common.size, least[1], common))
        if not found:
            return None
        _, _, source, common = min(found)
        self._load[source] = self._load.get(source, 0) + common.size
        return source, common


def _solve(
    wants: Iterable[tuple[WorkerId, Sequence[Slice]]],
    own: Mapping[WorkerId, tuple[_Group, ...]],
    groups: Sequence[_Group],
    node_of: Mapping[WorkerId, NodeId],
) -> Resharding:
    """`wants` in order of the workers; `own` are the groups that each worker itself is in."""
    sources = _Sources(groups, node_of)
    kept: dict[WorkerId, tuple[Slice, ...]] = {}
    moves: list[Transfer] = []
    missing: list[Missing] = []
    for target, wanted in wants:
        mine = own.get(target, ())
        if any(group.held == wanted for group in mine):
            kept[target] = tuple(wanted)
            continue
        keeps: list[Slice] = []
        for piece in wanted:
            rest = [piece.box] if piece.box.size else []
            for group in mine:
                for box in group.boxes(piece.tensor):
                    keeps += [Slice(piece.tensor, common) for part in rest if (common := part.intersect(box))]
                    rest = [left for part in rest for left in part.subtract(box)]
            for node in (node_of[target], None):
                rest = _fetch(sources, target, piece.tensor, rest, node, moves)
            missing += [Missing(target, piece.tensor, part) for part in rest]
        kept[target] = tuple(keeps)
    return Resharding(kept, tuple(moves), tuple(missing))


def _fetch(
    sources: _Sources, target: WorkerId, tensor: str, boxes: Sequence[Box], node: NodeId | None, moves: list[Transfer]
) -> list[Box]:
    """Adds transfers from `node` (None: anywhere) to `moves`; returns what nobody there holds."""
    rest: list[Box] = []
    todo = list(boxes)
    while todo:
        wanted = todo.pop(0)
        sent = sources.send(tensor, wanted, node)
        if sent is None:
            rest.append(wanted)
        else:
            moves.append(Transfer(sent[0], target, tensor, sent[1]))
            todo += wanted.subtract(sent[1])
    return rest
