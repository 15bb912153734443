"""Who holds the committed version while a world is formed, runs or is being repaired; and what mirrors hold."""

from evenkeel.control.modes import Aborting, Forming, Running
from evenkeel.control.saving import in_line, newest_first
from evenkeel.control.state import State
from evenkeel.core.ids import INITIAL, Version, WorkerId
from evenkeel.core.model import Shard
from evenkeel.plan.copies import shards_in
from evenkeel.plan.coverage import lost_slices


def is_last_holder(s: State, worker: WorkerId) -> bool:
    """Whether some of the committed state may be lost with this worker: whether the others are known to hold all of it.

    The initial state everybody can make, and one that is saved everybody can read.
    """
    if s.committed in (INITIAL, *s.saved):
        return False
    others = [shard for w, shards in _held(s).items() if w != worker for shard in shards]
    return bool(lost_slices(s.policy.model, others))


def newest_mirrored(s: State) -> Version | None:
    """The newest version of the run's line of which the mirrors of those who are alive hold all, if there is any."""
    mirrored: dict[Version, list[Shard]] = {}
    for held in (held for holdings in s.holdings.values() for held in holdings):
        version = held.version
        if held.mirror and version is not None and version not in s.distrusted and in_line(s, version):
            mirrored.setdefault(version, []).append(held.shard)
    for version in newest_first(tuple(mirrored)):
        if not lost_slices(s.policy.model, mirrored[version]):
            return version
    return None


def _held(s: State) -> dict[WorkerId, tuple[Shard, ...]]:
    """Shards of the committed version by worker.

    A world that has begun to train holds it by its layout. While a decision is carried out, and where it was not heard
    that a world began, only what the last decision has left is known: then rather too many are taken for the last.
    """
    held = {
        w: tuple(h.shard for h in s.holdings.get(w, ()) if h.version == s.committed) for w in sorted(s.roster.alive)
    }
    match s.mode:
        case Running(world) | Aborting(world, ran=True):
            members = frozenset(s.survivors(world))
        case Forming(world, awaited):
            members = frozenset(s.survivors(world)) - awaited
        case _:
            return held
    shards = shards_in(world, s.policy.model)
    for w in sorted(members):
        held[w] = (*held[w], shards[w])
    return held
