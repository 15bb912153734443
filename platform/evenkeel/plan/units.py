"""TP groups: workers of one node that take a place together."""

from collections import defaultdict, deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from operator import attrgetter

from evenkeel.core.ids import NodeId, WorkerId
from evenkeel.core.layout import Layout, WorkerInfo

_Group = tuple[tuple[int, int] | None, tuple[WorkerId, ...]]
"""Its home, if it has one, and its members."""


@dataclass(frozen=True, slots=True)
class Unit:
    """Workers of one node, by TP rank, that can take one place of a layout.

    Attributes:
        order: index of the first of them in order of preference.
        home: (pipeline, stage) of the previous layout that some of them hold together; None for a new group.
    """

    members: tuple[WorkerId, ...]
    node: NodeId
    order: int
    home: tuple[int, int] | None


def form_units(workers: Sequence[WorkerInfo], tensor: int, previous: Layout | None) -> tuple[Unit, ...]:
    """As many groups of `tensor` workers of one node as there can be, in order of preference.

    Groups of the previous layout stay together. Where one has lost a member, the others keep their TP ranks and a
    worker of the same node that has no place takes the free one; failing that, a member of the group that has lost
    most.

    Args:
        workers: in order of preference.
    """
    by_node: dict[NodeId, list[WorkerId]] = defaultdict(list)
    for worker in workers:
        by_node[worker.node_id].append(worker.worker_id)
    order = {worker.worker_id: i for i, worker in enumerate(workers)}
    units: list[Unit] = []
    for node, here in by_node.items():
        keeps_homes = previous is not None and previous.tensor == tensor
        groups, pool = _homed(here, tensor, previous) if previous and keeps_homes else ([], here)
        if pool:
            pool = sorted(pool, key=lambda w: (_neighbourhood(w, tensor, previous), order[w]))
            chunks = [pool[i : i + tensor] for i in range(0, len(pool) - tensor + 1, tensor)]
            groups += [(None, tuple(sorted(chunk, key=lambda w: _part(w, previous)))) for chunk in chunks]
        for home, members in groups:
            units.append(Unit(members, node, min(map(order.__getitem__, members)), home))
    return tuple(_with_homes_of_their_own(sorted(units, key=attrgetter("order"))))


def _with_homes_of_their_own(units: Iterable[Unit]) -> Iterator[Unit]:
    """A group that reached over nodes may live on in several: the first has its home."""
    homes: set[tuple[int, int]] = set()
    for unit in units:
        yield replace(unit, home=None) if unit.home in homes else unit
        if unit.home is not None:
            homes.add(unit.home)


def _homed(here: Sequence[WorkerId], tensor: int, previous: Layout) -> tuple[list[_Group], list[WorkerId]]:
    """The groups of one node that live on, with their homes; and who is left."""
    places = previous.places
    whole = _whole(here, tensor, previous)
    if whole is not None:
        return whole, []
    survivors: dict[tuple[int, int], dict[int, WorkerId]] = {}
    pool: list[WorkerId] = []
    for worker in here:
        place = places.get(worker)
        if place is None:
            pool.append(worker)
        else:
            survivors.setdefault((place.pipeline, place.stage), {})[place.tp] = worker
    groups = deque(sorted(survivors.items(), key=lambda group: (-len(group[1]), group[0])))
    homed: list[_Group] = []
    while groups:
        home, seats = groups.popleft()
        while len(seats) + len(pool) < tensor and groups:
            pool += groups.pop()[1].values()
        if len(seats) + len(pool) < tensor:
            pool += seats.values()
        else:
            homed.append((home, tuple(seats[tp] if tp in seats else pool.pop(0) for tp in range(tensor))))
    return homed, pool


def _whole(here: Sequence[WorkerId], tensor: int, previous: Layout) -> list[_Group] | None:
    """The groups of one node of which nobody is gone, with their homes; None if there is anybody else."""
    groups: list[_Group] = []
    for i in range(0, len(here), tensor):
        place = previous.places.get(here[i])
        if place is None:
            return None
        members = previous.pipelines[place.pipeline].stages[place.stage].members
        if members != tuple(here[i : i + tensor]):
            return None
        groups.append(((place.pipeline, place.stage), members))
    return groups


def _neighbourhood(worker: WorkerId, tensor: int, previous: Layout | None) -> tuple[int, ...]:
    """Sorts the members of one old TP group together, and if they are to form smaller groups, each spread."""
    if previous is None or worker not in previous.places:
        return (1,)
    place = previous.places[worker]
    return 0, place.pipeline, place.stage, place.tp % max(1, previous.tensor // tensor), place.tp


def _part(worker: WorkerId, previous: Layout | None) -> float:
    """Where in each cut tensor the worker's part lay, 0 to 1: in this order new TP ranks overlap old ones most."""
    return previous.places[worker].tp / previous.tensor if previous and worker in previous.places else 1.0
