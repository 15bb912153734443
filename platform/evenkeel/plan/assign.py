"""Who takes which place of a new layout: those who are in it stay, and the others move as little state as is simple."""

from collections.abc import Mapping, Sequence
from itertools import accumulate, product
from math import prod

from evenkeel.core.ids import NodeId, WorkerId
from evenkeel.core.layout import Layout
from evenkeel.core.model import ModelShape
from evenkeel.plan.units import Unit

Range = tuple[int, int]
Seat = tuple[int, int]
"""A place to be taken: index of the pipeline, and of the stage in it."""


def assign(
    units: Sequence[Unit], seats: Mapping[Seat, Range], model: ModelShape, previous: Layout | None
) -> Mapping[Seat, tuple[WorkerId, ...]]:
    """Gives each seat a unit.

    First, who has a home that is a seat with the same layers stays there. Then pairs of the layers that units hold
    and the layers that seats want are matched, those with most parameters in common first. The rest fill the seats
    that are left, node by node, so that neighbouring stages share a node and copies of a stage do not.

    Args:
        units: as many as there are seats, in order of preference.
        seats: with their layers (start, stop), in order of rank.
    """
    taken: dict[Seat, tuple[WorkerId, ...]] = {}
    movers: list[Unit] = []
    for unit in units:
        home = unit.home
        if home is not None and home in seats and previous and seats[home] == _layers(previous, home):
            taken[home] = unit.members
        else:
            movers.append(unit)
    held = {unit.order: _held(unit, previous) for unit in movers}
    free = {seat: layers for seat, layers in seats.items() if seat not in taken}
    movers = _match(movers, held, free, model, taken)
    nodes: dict[NodeId, list[Unit]] = {}
    for unit in movers:
        nodes.setdefault(unit.node, []).append(unit)
    rest = (seat for seat in free if seat not in taken)
    fill = [unit.members for group in nodes.values() for unit in group]
    return taken | dict(zip(list(rest), fill, strict=True))


def _layers(layout: Layout, seat: Seat) -> Range:
    pipeline, index = seat
    stage = layout.pipelines[pipeline].stages[index]
    return stage.start, stage.stop


def _held(unit: Unit, previous: Layout | None) -> tuple[Range, ...]:
    """The layers of each member that had a place."""
    if previous is None:
        return ()
    shards = [previous.shards[worker] for worker in unit.members if worker in previous.shards]
    return tuple((shard.start, shard.stop) for shard in shards)


def _match(
    units: Sequence[Unit],
    held_by: Mapping[int, tuple[Range, ...]],
    seats: Mapping[Seat, Range],
    model: ModelShape,
    taken: dict[Seat, tuple[WorkerId, ...]],
) -> list[Unit]:
    """Adds pairs that have parameters in common to `taken`, greedily; returns the units that are left.

    Args:
        held_by: what units hold, by their order.
    """
    sizes = (sum(prod(param.shape) for param in layer.params) for layer in model.layers)
    before = (0, *accumulate(sizes))
    units_of: dict[tuple[Range, ...], list[Unit]] = {}
    seats_of: dict[Range, list[Seat]] = {}
    for unit in units:
        units_of.setdefault(held_by[unit.order], []).append(unit)
    for seat, layers in seats.items():
        seats_of.setdefault(layers, []).append(seat)
    pairs = [(_common(held, layers, before), held, layers) for held, layers in product(units_of, seats_of)]
    # sorted() is stable, so ties go by preference and rank.
    for common, held, layers in sorted(pairs, key=lambda pair: -pair[0]):
        while common and units_of[held] and seats_of[layers]:
            taken[seats_of[layers].pop(0)] = units_of[held].pop(0).members
    left = {unit.order for group in units_of.values() for unit in group}
    return [unit for unit in units if unit.order in left]


def _common(held: Sequence[Range], wanted: Range, before: Sequence[int]) -> int:
    """Elements of the wanted layers that the members have; before[i] is the size of the layers before i."""
    spans = ((max(start, wanted[0]), min(stop, wanted[1])) for start, stop in held)
    return sum(before[stop] - before[start] for start, stop in spans if start < stop)
