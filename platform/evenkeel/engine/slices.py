"""Slices of the state in flat buffers, of which some ranges are held; see plan/flat.py."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence

from torch import Tensor

from evenkeel.core.boxes import Box
from evenkeel.core.model import Shard
from evenkeel.plan.flat import Place
from evenkeel.plan.state import KINDS


class OwnedSlices(ABC):
    """Boxes of tensors "KIND/NAME" that lie in the owned ranges of a shard.

    Args:
        places: of all the shard's parameters.
        owned: ranges (start, stop) of its flat buffers, in order.
    """

    def __init__(self, shard: Shard, places: Sequence[Place], owned: Sequence[tuple[int, int]]) -> None:
        self.shard = shard
        self.owned = tuple(owned)
        self._pieces: Mapping[str, tuple[tuple[Box, int], ...]] = {
            place.param.name: tuple(piece for span in owned for piece in place.within(*span)) for place in places
        }

    @property
    def size(self) -> int:
        """Elements of each kind that are owned, gaps included."""
        return sum(stop - start for start, stop in self.owned)

    @abstractmethod
    def range(self, kind: str, start: int, stop: int) -> Tensor:
        """Elements start to stop, counted in the shard's flat buffers, of "param", "exp_avg" or "exp_avg_sq".

        Raises:
            KeyError: unless they lie within one owned range.
        """

    def offset(self, start: int, stop: int) -> int:
        """How many owned elements come before these. Raises KeyError unless they lie within one owned range."""
        before = 0
        for first, last in self.owned:
            if first <= start and stop <= last:
                return before + start - first
            before += last - first
        raise KeyError(f"elements {start} to {stop}")

    def pieces(self) -> Iterator[tuple[str, Box, Tensor]]:
        """All that is owned: tensors "KIND/NAME", boxes of them, and their elements, flat and contiguous."""
        for kind in KINDS:
            for name, owned in self._pieces.items():
                for box, start in owned:
                    yield f"{kind}/{name}", box, self.range(kind, start, start + box.size)

    def holds(self, name: str, box: Box) -> bool:
        """Whether this box of the tensor "KIND/NAME" lies within one that is owned."""
        return any(piece.contains(box) for piece, _ in self._pieces.get(name.partition("/")[2], ()))

    def view(self, name: str, box: Box) -> Tensor:
        """The elements of a box of the tensor "KIND/NAME", to read or to write. Raises KeyError unless `holds` it."""
        kind, _, parameter = name.partition("/")
        for piece, start in self._pieces.get(parameter, ()):
            if piece.contains(box):
                return self.range(kind, start, start + piece.size).view(piece.shape)[box.within(piece)]
        raise KeyError(name)
