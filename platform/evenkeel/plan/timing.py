"""What workers measure of their steps, as slots of every so many votes: so everybody's comes in the leader's report.

Each worker has slots of its own, which come after the vote's values and the checksums. No message is needed beside the
all-reduce that is there anyway. What was not measured is -1, so that 0 says that somebody's part is missing (rule 2).
"""

from collections.abc import Iterator, Sequence

from evenkeel.core.ids import WorkerId
from evenkeel.core.vote import Timing
from evenkeel.core.world import World

MEASURE_EVERY = 4
"""Steps between two votes that tell: few enough that three of them (control/speeds.py) come within a dozen steps."""

UNKNOWN = -1.0
_FIXED = 4
"""Slots of each worker, beside one for each of its layers."""


def due(world: World, step: int) -> bool:
    """Whether the vote of a step tells. Not that of a generation's first, which is slow for reasons of its own."""
    return world.measure_every is not None and step % world.measure_every == 0 and step > world.base.step + 1


def slots(world: World, timing: Timing) -> list[float]:
    """All slots, with those of the timing's worker filled in."""
    before = after = depth = 0
    for worker, layers in _layers(world):
        if worker == timing.worker:
            depth = layers
            before, after = after, 0
        else:
            after += _FIXED + layers
    parts = timing.layers if len(timing.layers) == depth else (0.0,) * depth
    source = None if timing.source is None else 1.0 + world.layout.places[timing.source].rank
    mine = (timing.pass_s, timing.receive_s, source, timing.bytes_per_s, *parts)
    return [0.0] * before + [value or UNKNOWN for value in mine] + [0.0] * after


def split(world: World, step: int, summed: Sequence[float]) -> tuple[Sequence[float], Sequence[float]]:
    """What of the sum of everybody's slots is the vote and its checksums, and what was measured, for `read`.

    With a part missing there is no vote, so that it does not count (rule 2).
    """
    if not due(world, step):
        return summed, ()
    count = sum(_FIXED + layers for _, layers in _layers(world))
    told = summed[len(summed) - count :]
    if len(summed) < count or 0.0 in told:
        return (), ()
    return summed[: len(summed) - count], told


def read(world: World, told: Sequence[float]) -> tuple[Timing, ...]:
    """What a vote told of every member; nothing if it told nothing."""
    return tuple(_read(world, told)) if told else ()


def _read(world: World, told: Sequence[float]) -> Iterator[Timing]:
    members = world.layout.members
    at = 0
    for worker, layers in _layers(world):
        pass_s, receive_s, source, bytes_per_s, *parts = told[at : at + _FIXED + layers]
        at += _FIXED + layers
        known = pass_s > 0 and all(part != UNKNOWN for part in parts)
        yield Timing(
            worker,
            pass_s=max(0.0, pass_s),
            receive_s=max(0.0, receive_s),
            layers=tuple(parts) if known else (),
            source=None if source == UNKNOWN else members[int(source) - 1],
            bytes_per_s=max(0.0, bytes_per_s),
        )


def _layers(world: World) -> Iterator[tuple[WorkerId, int]]:
    """Each member by rank, with how many layers it tells of."""
    for pipeline in world.layout.pipelines:
        for stage in pipeline.stages:
            for tp, worker in enumerate(stage.members):
                yield worker, 0 if tp else stage.stop - stage.start
