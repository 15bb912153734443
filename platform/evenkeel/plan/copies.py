"""Who keeps and updates which part of the optimizer state: r workers of each sync group.

All TP ranks of one place own the same ranges. They take over one rank's summed gradients of what none of them cuts
(`engine/sums.py`), and there are sums only where it owns: so owners are places, chosen once for all their TP ranks.

The flat range of a sync group is cut into parts, equal to within one alignment unit. That is what a reduce-scatter
wants, and cuts that keep to the alignment keep the optimizer's vector units off tails, so that all owners get the same
bits. The other choice, cutting tensors along their rows, would need no `flat_boxes`, but parts would differ by a row
(30 KB and more) and begin anywhere. A cut inside a matrix costs three boxes instead of one, at n - 1 places per unit.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from math import gcd

from evenkeel.core.ids import NodeId, WorkerId
from evenkeel.core.layout import Layout, SyncGroup, sync_groups
from evenkeel.core.model import ModelShape, Shard
from evenkeel.core.world import World
from evenkeel.plan.flat import ALIGNMENT, Place, flat_places

BUCKET = 1 << 20
"""Elements that are summed in one go, at least: fewer cost too many round trips, more begin too late to overlap."""


@dataclass(frozen=True, slots=True)
class Part:
    """Elements start to stop of a sync group's flat range, and who owns them.

    Attributes:
        owners: the first receives the sum and copies it to the others, so that all have the same bits.
    """

    start: int
    stop: int
    owners: tuple[WorkerId, ...]


@dataclass(frozen=True, slots=True)
class Ownership:
    """How one sync group's flat range is shared out.

    Attributes:
        places: of its parameters, counted from the group's first element.
        units: ranges that are summed in one go; each is cut for itself, into as many parts as there are members.
        parts: in order; together they are the whole range. Empty ones are left out.
    """

    group: SyncGroup
    places: tuple[Place, ...]
    units: tuple[tuple[int, int], ...]
    parts: tuple[Part, ...]

    @property
    def size(self) -> int:
        return self.places[-1].stop

    def ranges(self) -> Mapping[WorkerId, tuple[tuple[int, int], ...]]:
        """The elements (start, stop) that each member owns, neighbouring parts as one."""
        found: dict[WorkerId, list[tuple[int, int]]] = {worker: [] for worker in self.group.members}
        for part in self.parts:
            for worker in part.owners:
                mine = found[worker]
                joins = mine and mine[-1][1] == part.start
                mine.append((mine.pop()[0] if joins else part.start, part.stop))
        return {worker: tuple(mine) for worker, mine in found.items()}


@dataclass(frozen=True, slots=True)
class Copies:
    """Who owns what, by sync group in their one order; `asked` is how many owners each slice was to have."""

    groups: tuple[Ownership, ...]
    asked: int
    node_of: Mapping[WorkerId, NodeId]

    @property
    def reason(self) -> str:
        """What it survives, in words."""
        parts = [part for ownership in self.groups for part in ownership.parts]
        total = sum(ownership.size for ownership in self.groups)
        alone = sum(p.stop - p.start for p in parts if len({self.node_of[w] for w in p.owners}) == 1)
        fewest = min(min(self.asked, len(ownership.group.members)) for ownership in self.groups)
        short = "" if fewest == self.asked else f" (asked for {self.asked}; a group has only {fewest} members)"
        kept = f"each slice of optimizer state has at least {fewest} {'owner' if fewest == 1 else 'owners'}{short}"
        if alone == 0:
            return f"{kept}, on different nodes"
        whose = "has its only owner" if fewest == 1 else "has its owners"
        return f"{kept}; {alone / total:.0%} of it {whose} on one node"


def place_copies(
    layout: Layout,
    model: ModelShape,
    copies: int,
    node_of: Mapping[WorkerId, NodeId],
    alignment: int = ALIGNMENT,
    bucket: int | None = BUCKET,
) -> Copies:
    """Shares out each sync group's range so that each element has min(copies, members) owners, on different nodes.

    Every member owns equally much, to within one alignment unit per part. That goes before different nodes: where one
    has more than 1/r of a group's members, parts have two owners on it; no arrangement with equal loads avoids more.
    So does that all TP ranks of a place own the same: of TP groups that reach over nodes, rank 0's nodes count.

    Args:
        copies: r; the size of a group or more is plain data parallelism, 1 is ZeRO-1.
        node_of: of all members of the layout.
        alignment: of parameters and of cuts, in elements.
        bucket: how many elements are summed in one go, at least; a unit is so many layers, from the last to the first.
            None: a whole group is one unit.

    Raises:
        ValueError: if copies is below 1.
    """
    if copies < 1:
        raise ValueError(f"redundancy.copies is {copies}; it must be at least 1")
    groups: list[Ownership] = []
    synced = sync_groups(layout, model)
    for i, group in enumerate(synced):
        places = group_places(model, group, layout.tensor, alignment)
        units = _units(places, bucket)
        first = synced[i - group.part]  # the same group of TP rank 0
        owning = _owners([node_of[worker] for worker in first.members], copies)
        owners = [tuple(group.members[index] for index in part) for part in owning]
        parts = tuple(part for unit in units for part in _cut(unit, owners, alignment))
        groups.append(Ownership(group, places, units, parts))
    return Copies(tuple(groups), copies, node_of)


def copies_of(world: World, model: ModelShape) -> Copies:
    """The ownership in a world; every member comes to the same.

    Where everybody owns all (world.copies is None), only the first owners are named: those who write and count.
    """
    return place_copies(world.layout, model, world.copies or 1, dict(world.nodes))


def shards_in(world: World, model: ModelShape) -> Mapping[WorkerId, Shard]:
    """What each member of a world keeps the state of."""
    if world.copies is None:
        return world.layout.shards
    return shards(copies_of(world, model), world.layout, model)


def shards(copies: Copies, layout: Layout, model: ModelShape, alignment: int = ALIGNMENT) -> Mapping[WorkerId, Shard]:
    """What each member of the layout holds: its shard, and which ranges of that it owns."""
    owned: dict[WorkerId, list[tuple[int, int]]] = {worker: [] for worker in layout.members}
    for ownership, origins in with_origins(copies, layout, model, alignment):
        for worker, ranges in ownership.ranges().items():
            origin = origins[worker]
            owned[worker] += [(origin + start, origin + stop) for start, stop in ranges]
    return {worker: replace(layout.shard(worker), owned=tuple(sorted(mine))) for worker, mine in owned.items()}


def with_origins(
    copies: Copies, layout: Layout, model: ModelShape, alignment: int
) -> Iterator[tuple[Ownership, Mapping[WorkerId, int]]]:
    """Each sync group's, with the element of each member's flat buffers at which the group's range begins."""
    starts: dict[Shard, dict[str, int]] = {}
    for shard in dict.fromkeys(layout.shards.values()):
        starts[shard] = {place.param.name: place.start for place in flat_places(model, shard, alignment)}
    for ownership in copies.groups:
        first = ownership.places[0].param.name
        yield ownership, {worker: starts[layout.shard(worker)][first] for worker in ownership.group.members}


def group_places(model: ModelShape, group: SyncGroup, tensor: int, alignment: int) -> tuple[Place, ...]:
    """Where the group's parameters lie in every member's flat buffers, counted from the group's first element."""
    shard = Shard(group.start, group.stop, group.part, tensor)
    places = [p for p in flat_places(model, shard, alignment) if p.param.name in group.params]
    origin = places[0].start
    return tuple(Place(p.param, p.box, p.layer, p.start - origin, p.stop - origin) for p in places)


def _units(places: Sequence[Place], bucket: int | None) -> tuple[tuple[int, int], ...]:
    """Ranges of whole layers of at least `bucket` elements; what is left over at the front may be smaller."""
    bounds = [places[-1].stop]
    for before, place in reversed(list(pairwise(places))):
        if bucket is not None and before.layer != place.layer and bounds[-1] - place.start >= bucket:
            bounds.append(place.start)
    return tuple(pairwise([0, *reversed(bounds)]))


def _owners(nodes: Sequence[NodeId], copies: int) -> Sequence[Sequence[int]]:
    """The owners of each of as many parts as there are members; each member owns r parts and is first in one.

    McNaughton's wrap-around rule (1959): members in order of their nodes take r parts each, one after the other and
    round again. A node with c members takes c * r parts in a row, so none twice before it has had all n of them.

    Args:
        nodes: of the members; these are known by their indices.
    """
    count, r = len(nodes), min(copies, len(nodes))
    by_node: dict[NodeId, list[int]] = {}
    for index, node in enumerate(nodes):
        by_node.setdefault(node, []).append(index)
    ordered = [index for here in by_node.values() for index in here]
    parts: list[list[int]] = [[] for _ in nodes]
    each = count // gcd(count, r)  # members before m * r comes round to the same part; it is then the next one's turn
    for m, index in enumerate(ordered):
        first = m // each
        for turn in range(r):
            owners = parts[(m * r + turn) % count]
            owners.insert(0 if turn == first else len(owners), index)
    return parts


def _cut(unit: tuple[int, int], owners: Sequence[tuple[WorkerId, ...]], alignment: int) -> Iterator[Part]:
    start, stop = unit
    lines = (stop - start) // alignment
    bounds = (start + lines * i // len(owners) * alignment for i in range(len(owners) + 1))
    for (a, b), owning in zip(pairwise(bounds), owners, strict=True):
        if a < b:
            yield Part(a, b, owning)
