"""Copies of the state that differ: who is to blame, and what must not be believed any more (silent corruption).

The vote of a step says whether the copies of the version before it are the same. If not, nobody commits that step, and
the decision that closes the generation says what follows. Of three or more copies of a part the majority is right: the
others' owners are killed and replaced, and the run goes on from the same version. Where there is no majority nobody
knows which copy is right: all are dropped, and the run goes back to its newest checkpoint that can be trusted.

That is one of a version whose copies agreed. The vote after a saved step compares them, so they did if the generation
that saved it has committed another step. Of the version with which a generation ended this is not known: somebody may
have died that held, and wrote, another copy. When everybody has read its state from there, with nothing kept in memory,
the run is made of that checkpoint as it is, and what differs later is not what was written. But where some have kept
their part (World.sources), that may be what differs from what was read; and if not, nobody may have read what is wrong.
"""

from collections import Counter
from collections.abc import Container, Iterable, Iterator
from dataclasses import dataclass, field

from evenkeel.control.entries import Entry, StepSettled, WorldOpened
from evenkeel.control.parts import Decision, Divergence
from evenkeel.control.state import State, names
from evenkeel.core.ids import Version, WorkerId
from evenkeel.core.vote import Difference, Flags, Vote
from evenkeel.core.world import World

CAUSE = "silent corruption"


def judge(vote: Vote) -> Divergence:
    """Who holds what the majority of a part's owners does not; and whose parts have no majority."""
    odd: set[WorkerId] = set()
    doubtful: set[WorkerId] = set()
    for difference in vote.differences:
        right = _majority(difference)
        owners = {owner for owner, checksum in difference.sums if checksum != right}
        (doubtful if right is None else odd).update(owners)
    return Divergence(vote.step, vote.differences, tuple(sorted(odd)), tuple(sorted(doubtful)))


def _majority(difference: Difference) -> int | None:
    """The checksum that more than half of the owners have. Two copies that differ have none."""
    [(checksum, count)] = Counter(checksum for _, checksum in difference.sums).most_common(1)
    return checksum if 2 * count > len(difference.sums) else None


def describe(divergence: Divergence) -> str:
    """One line: what differs, where, and what is made of it."""
    parts = [f"{d.part} on {' '.join(owner for owner, _ in d.sums)}" for d in divergence.differences]
    what = f"copies of step {divergence.step - 1} differ: {names(parts)}"
    if divergence.odd:
        what = f"{what}; the majority is against {names(divergence.odd)}"
    return f"{what}; nobody knows which of {names(divergence.doubtful)} is right" if divergence.doubtful else what


def remember(s: State, world: World, decision: Decision) -> None:
    """What follows from a decision for as long as it matters; also where the journal is replayed."""
    s.trouble.reached(decision.base.step)
    _distrust(s, world, decision)
    divergence = decision.divergence
    if divergence is not None and divergence.doubtful:
        s.holdings = {}
        s.doubt = describe(divergence)
        s.trouble.doubtful(divergence.step, s.doubt)


def tell(s: State, divergence: Divergence) -> None:
    """The line of events. A checkpoint of the version that differs is neither taken nor waited for any more; unless the
    run goes back anyway, another one is asked for."""
    parts = [difference.part for difference in divergence.differences]
    workers = sorted({*divergence.odd, *divergence.doubtful})
    s.log("divergence", parts=parts, workers=workers, reason=describe(divergence))
    dropped = sorted(s.distrusted & {*s.saved, *s.uploads})
    for version in dropped:
        s.uploads.pop(version, None)
        s.log("checkpoint_distrusted", checkpoint=version.step)
    s.saved = [v for v in s.saved if v not in s.distrusted]
    if dropped and not divergence.doubtful:
        s.pending |= Flags.CHECKPOINT


def blame(divergence: Divergence, alive: Container[WorkerId]) -> Iterator[tuple[WorkerId, str]]:
    """Whom to kill of those that are alive, each with the cause."""
    for worker in (odd for odd in divergence.odd if odd in alive):
        parts = [d.part for d in divergence.differences if dict(d.sums).get(worker, _majority(d)) != _majority(d)]
        yield worker, f"{CAUSE}: its copy of {names(parts)} is not that of the others"


def agreed(s: State, version: Version) -> bool:
    """Whether the copies of a version that is saved are known to be equal, if there are several: a later vote of its
    generation has compared them (plan/comparison.py), or everybody has read its checkpoint."""
    return version not in s.unproven and (version.generation < s.generation or version.step < s.visible)


def opened(s: State, world: World) -> None:
    """A world begins, from a version that counts; also where the journal is replayed."""
    s.doubt = ""
    _read(s, world)


# ---------------------------------------------------------------- which checkpoints may hold a wrong copy


@dataclass
class _Replayed:
    """Of State, what follows from the journal alone."""

    distrusted: set[Version] = field(default_factory=set)
    unproven: set[Version] = field(default_factory=set)


def distrusted(entries: Iterable[Entry]) -> dict[Version, str]:
    """Versions whose checkpoints may hold a wrong copy, and how that came out; for those who have only the journal.

    Args:
        entries: of all lives so far, oldest first.

    Returns:
        What a controller that replays them has in State.distrusted. Whether there are such checkpoints it does not say.
    """
    found: dict[Version, str] = {}
    s = _Replayed()
    world: World | None = None
    for entry in entries:
        match entry:
            case WorldOpened():
                world = entry.world
                _read(s, world)
            case StepSettled(decision):
                assert world is not None
                _distrust(s, world, decision)
                if decision.divergence is not None:
                    found |= dict.fromkeys(s.distrusted - found.keys(), describe(decision.divergence))
    return found


def _distrust(s: State | _Replayed, world: World, decision: Decision) -> None:
    if decision.base.generation == world.generation:
        s.unproven.add(decision.base)
    divergence = decision.divergence
    if divergence is None:
        return
    if decision.base in s.unproven:
        # Else an earlier vote has compared it, or all copies were read from its checkpoint: that is not what differs.
        s.distrusted.add(decision.base)
    if divergence.doubtful:
        s.distrusted |= s.unproven


def _read(s: State | _Replayed, world: World) -> None:
    if world.saved and not world.sources:
        s.unproven.discard(world.base)
