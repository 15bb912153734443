"""What simulated workers hold: for each slice the history that made it, so that a mixed-up state shows."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from evenkeel.core.boxes import Box
from evenkeel.core.ids import Version
from evenkeel.core.model import ModelShape, Shard
from evenkeel.plan.state import Slice, slices

History = tuple[Version, ...]
"""The versions that a state went through, one per committed step. True bytes would differ if the histories do.

Before them stand the bits that have flipped in it, as FLIPPED. Whatever is made from flipped bits is another content.
"""

TORN: History = (Version(-1, -1),)
"""Bytes that are nothing: half-written, freed, or never received."""


FLIPPED = -2
"""Step of what is no version but a flipped bit; its generation numbers them."""


def clean(history: History) -> History:
    """As if no bit had flipped."""
    return tuple([v for v in history if v.step != FLIPPED])


def flips(history: History) -> frozenset[int]:
    """Numbers of the bits that have flipped in a content."""
    return frozenset(v.generation for v in history if v.step == FLIPPED)


def with_flips(history: History, numbers: Iterable[int]) -> History:
    """The same with these bits flipped too. What is torn is torn."""
    if history == TORN:
        return TORN
    return (*(Version(FLIPPED, n) for n in sorted({*flips(history), *numbers})), *clean(history))


def join(want: Slice, parts: Iterable[tuple[Box, History]]) -> History:
    """The history of a slice that is put together from parts: torn unless they agree and cover it, each piece once."""
    inside = [(box.intersect(want.box), history) for box, history in parts]
    got = sum(box.size for box, _ in inside if box is not None)
    histories = {clean(history) for box, history in inside if box is not None}
    flipped = {number for box, history in inside if box is not None for number in flips(history)}
    return with_flips(histories.pop(), flipped) if got == want.box.size and len(histories) == 1 else TORN


Snapshot = tuple[Version, Shard]
"""What a mirrored shard is known by."""


@dataclass
class Memory:
    """Shards in a worker's memory, each slice with its history; beside them the mirrored ones."""

    model: ModelShape
    shards: dict[Shard, dict[Slice, History]] = field(default_factory=dict)
    mirrors: dict[Snapshot, dict[Slice, History]] = field(default_factory=dict)

    def initialise(self, shard: Shard) -> None:
        self.shards[shard] = dict.fromkeys(slices(self.model, shard), ())

    def read(self, among: Iterable[Shard], tensor: str, box: Box) -> History:
        """The history of the bytes of this box in these shards; TORN where they are not held whole."""
        return _read((self.shards.get(shard, {}) for shard in among), tensor, box)

    def read_mirrored(self, among: Iterable[Snapshot], tensor: str, box: Box) -> History:
        return _read((self.mirrors.get(snapshot, {}) for snapshot in among), tensor, box)

    def snapshot(self, of: Shard, shard: Shard) -> dict[Slice, History]:
        """A copy of what lies in `shard`, a part of the shard `of` that is trained."""
        return {piece: self.read((of,), piece.tensor, piece.box) for piece in slices(self.model, shard)}

    def write(self, shard: Shard, contents: Mapping[Slice, History]) -> None:
        self.shards[shard] = dict(contents)

    def keep_only(self, shards: set[Shard]) -> None:
        """Frees the rest."""
        self.shards = {s: c for s, c in self.shards.items() if s in shards}

    def advance(self, shard: Shard, version: Version, whole: bool) -> None:
        """Every slice of the shard is written by a commit; torn if the sums it uses were not complete."""
        contents = self.shards[shard]
        for piece, history in contents.items():
            contents[piece] = (*history, version) if whole else TORN

    def tear(self, shard: Shard) -> None:
        """A commit has stopped half way."""
        self.shards[shard] = dict.fromkeys(self.shards[shard], TORN)

    def flip(self, shard: Shard, piece: Slice, number: int) -> None:
        """A bit of a slice changes."""
        contents = self.shards[shard]
        contents[piece] = with_flips(contents[piece], (number,))

    def history(self, shard: Shard, known: History | None = None) -> History:
        """The one history of all slices of the shard; TORN if they differ. Of nothing it is the known one.

        Flipped bits are left out: see corruption.py for what must hold of them.
        """
        found = [clean(history) for history in self.shards[shard].values()]
        if not found and known is not None:
            return known
        return found[0] if found and all(history == found[0] for history in found) else TORN


def _read(among: Iterable[Mapping[Slice, History]], tensor: str, box: Box) -> History:
    for contents in among:
        for piece, history in contents.items():
            if piece.tensor == tensor and piece.box.contains(box):
                return history
    return TORN
