"""Mirrors: which part of the state each worker has a copy of in the host memory of another, and of which.

Where only one worker keeps a slice of the state, its death would take everybody back to the last checkpoint. So every
few steps each worker takes a snapshot of what it is the first owner of, keeps it, and sends it to another worker: a
version of which all snapshots are alive, at their owner or there, can be gone back to.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from evenkeel.core.ids import NodeId, WorkerId
from evenkeel.core.layout import Layout
from evenkeel.core.model import ModelShape, Shard
from evenkeel.core.world import World
from evenkeel.plan.copies import Copies, copies_of
from evenkeel.plan.writers import ranges_written


@dataclass(frozen=True, slots=True)
class Mirroring:
    """What one worker mirrors, and where."""

    shard: Shard
    keeper: WorkerId


def are_needed(layout: Layout, copies: int | None) -> bool:
    """Whether some slice of the state has one owner only, and there is somebody to keep a mirror of it.

    With two pipelines each sync group has two members at least.

    Args:
        copies: as in World.
    """
    return len(layout.members) > 1 and (len(layout.pipelines) == 1 or copies == 1)


def mirrors_of(world: World, model: ModelShape, copies: Copies | None = None) -> Mapping[WorkerId, Mirroring]:
    """What each member that owns anything mirrors; together that is all of the state. Every member comes to the same.

    Args:
        copies: copies_of(world, model), if it is known already.
    """
    layout = world.layout
    owned = copies_of(world, model) if copies is None else copies
    keepers = keepers_of(layout.members, dict(world.nodes))
    found: dict[WorkerId, Mirroring] = {}
    for worker, spans in ranges_written(owned, layout, model).items():
        if spans:
            found[worker] = Mirroring(replace(layout.shard(worker), owned=tuple(sorted(spans))), keepers[worker])
    return found


def keepers_of(members: Sequence[WorkerId], node_of: Mapping[WorkerId, NodeId]) -> Mapping[WorkerId, WorkerId]:
    """Who keeps the mirror of whom: another worker, on another node where there are two, and each keeps equally many.

    With members in order of their nodes, the one that is as many places further as the largest node has members is on
    another node, unless that node has more than half of all. Those of its members that find nobody elsewhere so are
    spread over the other nodes, which keep more then: another failure domain is worth more than an equal load.

    Raises:
        ValueError: if there is only one member.
    """
    if len(members) < 2:
        raise ValueError("a single worker has nobody to keep its mirror")
    nodes: dict[NodeId, list[WorkerId]] = {}
    for worker in members:
        nodes.setdefault(node_of[worker], []).append(worker)
    row = [worker for node in sorted(nodes, key=lambda n: (-len(nodes[n]), n)) for worker in nodes[node]]
    far = max(map(len, nodes.values())) if len(nodes) > 1 else 1
    keepers: dict[WorkerId, WorkerId] = {}
    spread = 0
    for i, worker in enumerate(row):
        keeper = row[(i + far) % len(row)]
        if len(nodes) > 1 and node_of[keeper] == node_of[worker]:
            others = [w for w in row if node_of[w] != node_of[worker]]
            keeper = others[spread % len(others)]
            spread += 1
        keepers[worker] = keeper
    return keepers
