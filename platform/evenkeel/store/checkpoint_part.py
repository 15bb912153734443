"""One worker's part of a checkpoint, a safetensors file written and checksummed in one pass; and all parts together."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from xxhash import xxh3_64

from evenkeel.core.boxes import Box
from evenkeel.core.ids import Version
from evenkeel.store.files import Files, Sink
from evenkeel.store.final import ITEM_BYTES, header
from evenkeel.store.manifest import (
    CHECKSUM,
    CHUNK_BYTES,
    FORMAT,
    Content,
    FileRecord,
    Manifest,
    SliceRecord,
    TensorRecord,
    order,
    part_name,
    spec,
)

WRITE_BYTES = 1 << 20
"""Summed and then written at a time: little enough to be still in the cache for the second pass over it."""


@dataclass(frozen=True, slots=True)
class Piece:
    """A box of a tensor to be written.

    Attributes:
        tensor: "KIND/PARAMETER".
        dtype: as safetensors names it, such as "F32".
        shape: of the whole tensor.
        data: of the box, row-major, contiguous, little-endian; must not change until it is written.
    """

    tensor: str
    dtype: str
    shape: tuple[int, ...]
    box: Box
    data: memoryview


@dataclass(frozen=True, slots=True)
class Part:
    """What one worker wrote, for the manifest; core/codec.py takes it through JSON."""

    file: FileRecord
    tensors: tuple[TensorRecord, ...]


def write_part(
    files: Files,
    folder: str,
    version: Version,
    worker: str,
    pieces: Sequence[Piece],
    chunk_bytes: int = CHUNK_BYTES,
    moved: Callable[[], None] = lambda: None,
) -> Part:
    """Writes the pieces to a file of the worker's own, durably; the data is read once and not copied.

    Args:
        moved: called as often as some of it is written.

    Raises:
        ValueError: if a piece has an unknown dtype, or not the bytes of its box, or two are the same; if a file cannot
            be named after the worker.
        StoreError: if the store fails; then there is no such file, or the whole one of an earlier try.
    """
    name = part_name(version, worker)
    pieces = sorted(pieces, key=lambda p: order(p.dtype, p.tensor, p.box))
    head = header([spec(p.tensor, p.dtype, p.box) for p in pieces])
    tensors: list[TensorRecord] = []
    at = len(head)
    for piece in pieces:
        stop = at + piece.box.size * ITEM_BYTES[piece.dtype]
        if piece.data.nbytes != stop - at:
            raise ValueError(f"{piece.tensor} {piece.box}: {piece.data.nbytes} bytes, {stop - at} expected")
        tensors.append(TensorRecord(piece.tensor, piece.dtype, piece.shape, (SliceRecord(name, at, stop, piece.box),)))
        at = stop
    with files.stream(f"{folder}/{name}") as sink:
        out = _Summed(sink, chunk_bytes, moved)
        out.write(memoryview(head))
        for piece in pieces:
            if piece.data.nbytes:
                out.write(piece.data.cast("B"))
    return Part(FileRecord(name, at, chunk_bytes, out.checksums()), tuple(tensors))


def merge(
    version: Version, epoch: int, content: Content, parts: Sequence[Part], shapes: Mapping[str, tuple[int, ...]]
) -> Manifest:
    """The manifest of all parts together.

    Args:
        shapes: of every tensor that the checkpoint must have.

    Raises:
        ValueError: unless the parts cover each element of these tensors, and of no others, exactly once.
    """
    found: dict[str, list[TensorRecord]] = {}
    for tensor in (tensor for part in parts for tensor in part.tensors):
        found.setdefault(tensor.tensor, []).append(tensor)
    for name in sorted(found.keys() | shapes.keys()):
        if name not in found:
            raise ValueError(f"no part has anything of tensor {name!r}")
        if name not in shapes:
            raise ValueError(f"tensor {name!r} was written, which there is none of")
        kinds = {(tensor.dtype, tensor.shape) for tensor in found[name]}
        if len(kinds) > 1:
            raise ValueError(f"tensor {name!r} was written as " + " and as ".join(f"{d} {s}" for d, s in sorted(kinds)))
        if found[name][0].shape != shapes[name]:
            raise ValueError(f"tensor {name!r} was written with shape {found[name][0].shape}, not {shapes[name]}")
    tensors = tuple(
        TensorRecord(name, records[0].dtype, records[0].shape, tuple(s for record in records for s in record.slices))
        for name, records in sorted(found.items())
    )
    return Manifest(FORMAT, version, epoch, content, CHECKSUM, tuple(part.file for part in parts), tensors)


class _Summed:
    """A sink with a checksum for each chunk of what it was given."""

    def __init__(self, sink: Sink, chunk_bytes: int, moved: Callable[[], None]) -> None:
        self._sink, self._chunk_bytes, self._moved = sink, chunk_bytes, moved
        self._sum, self._room = xxh3_64(), chunk_bytes
        self._done: list[str] = []

    def write(self, data: memoryview) -> None:
        while data:
            piece = data[: min(self._room, WRITE_BYTES)]
            self._sum.update(piece)
            self._sink.write(piece)
            self._moved()
            self._room -= len(piece)
            if not self._room:
                self._done.append(self._sum.hexdigest())
                self._sum, self._room = xxh3_64(), self._chunk_bytes
            data = data[len(piece) :]

    def checksums(self) -> tuple[str, ...]:
        """Of all chunks; the last may be shorter."""
        rest = [self._sum.hexdigest()] if self._room < self._chunk_bytes else []
        return (*self._done, *rest)
