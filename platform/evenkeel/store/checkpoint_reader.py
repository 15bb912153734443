"""Reading from a complete checkpoint: any box of any tensor, by byte ranges, nothing of it unverified."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from heapq import merge
from itertools import groupby, product
from math import prod

from xxhash import xxh3_64_hexdigest

from evenkeel.core.boxes import Box, full
from evenkeel.store.errors import StoreError
from evenkeel.store.files import Files
from evenkeel.store.final import ITEM_BYTES
from evenkeel.store.manifest import CheckpointDamaged, FileRecord, Manifest, SliceRecord


@dataclass(frozen=True, slots=True)
class Want:
    """A box of a tensor, and where its bytes shall go: row-major, contiguous; a writable memoryview of bytes.

    Attributes:
        dtype: what they are taken for, as safetensors names it; "" if they are not.
        shape: what the whole tensor is taken for: a box of a larger one would be read as well. None if it is not.
    """

    tensor: str
    box: Box
    buffer: memoryview
    dtype: str = ""
    shape: tuple[int, ...] | None = None


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A complete checkpoint. Threads may read from it at once; each holds one chunk in memory."""

    files: Files
    folder: str
    manifest: Manifest

    @property
    def url(self) -> str:
        return self.files.where(self.folder)

    def read(self, wants: Sequence[Want]) -> None:
        """Fills the buffers. Each chunk that holds a part of them is read once (if no two want the same) and verified.

        After an error the buffers hold anything.

        Raises:
            ValueError: if there is no such tensor, it is of another dtype or shape, a box is not within it, or a buffer
                has not the size of its box.
            CheckpointDamaged: if a file is missing, cut or changed.
            StoreError: if the store fails.
        """
        found = sorted((c for want in wants for c in self._copies(want)), key=lambda c: (c.piece.file, c.piece.start))
        for name, in_file in groupby(found, key=lambda c: c.piece.file):
            chunks = self._chunks(name)
            for _, in_slice in groupby(in_file, key=lambda c: c.piece.start):
                for at, target in merge(*(copy.runs() for copy in in_slice), key=lambda run: run[0]):
                    chunks.copy(at, target)

    def damage(self, thorough: bool, also: str = "") -> Iterator[CheckpointDamaged]:
        """All that is wrong with the files: missing or of a wrong size; if `thorough` also each byte and the headers.

        Args:
            also: the name of a file whose bytes and header are looked at in any case.

        Raises:
            StoreError: if the store fails.
        """
        sizes = self.files.sizes(self.folder)
        for file in self.manifest.files:
            where = self.files.where(f"{self.folder}/{file.name}")
            size = sizes.get(file.name)
            if size is None:
                yield CheckpointDamaged(f"{where}: missing")
            elif size != file.size:
                yield CheckpointDamaged(f"{where}: has {size} bytes, {file.size} were written")
            elif thorough or file.name == also:
                yield from self._chunks(file.name).damage(self.manifest.header(file.name))

    def _chunks(self, name: str) -> "_Chunks":
        return _Chunks(self.files, f"{self.folder}/{name}", self.manifest.file(name))

    def _copies(self, want: Want) -> "Iterator[_Copy]":
        try:
            tensor = self.manifest.tensor(want.tensor)
        except KeyError:
            raise ValueError(f"{self.url}: has no tensor {want.tensor!r}") from None
        item = ITEM_BYTES[tensor.dtype]
        if want.dtype not in ("", tensor.dtype):
            raise ValueError(f"{self.url}: {want.tensor} is of {tensor.dtype}, not of {want.dtype}")
        if want.shape not in (None, tensor.shape):
            has, needs = list(tensor.shape), list(want.shape or ())
            raise ValueError(f"{self.url}: {want.tensor} has shape {has}, not {needs}")
        if not full(tensor.shape).contains(want.box):
            raise ValueError(f"{want.tensor}: {want.box} is not within {tensor.shape}")
        if want.buffer.nbytes != want.box.size * item:
            raise ValueError(f"{want.tensor}: a buffer of {want.buffer.nbytes} bytes for {want.box} of {tensor.dtype}")
        for piece in tensor.slices:
            common = piece.box.intersect(want.box)
            if common:
                yield _Copy(piece, common, want, item)


@dataclass(frozen=True, slots=True)
class _Copy:
    """What a slice of a file and a wanted box have in common."""

    piece: SliceRecord
    common: Box
    want: Want
    item: int  # bytes of an element

    def runs(self) -> Iterator[tuple[int, memoryview]]:
        """The bytes that are contiguous in both: where they are in the file, ascending, and where they go."""
        held, wanted, shape = self.piece.box.shape, self.want.box.shape, self.common.shape
        # Dimensions from `outer` on make up one run: all of these but the first are whole in both boxes.
        outer = max(len(shape) - 1, 0)
        while outer and shape[outer] == held[outer] == wanted[outer]:
            outer -= 1
        source = _strides(held, self.item)
        target = _strides(wanted, self.item)
        size = self.item * prod(shape[outer:])
        first = self.piece.start + _offset(self.common, self.piece.box, source)
        begin = _offset(self.common, self.want.box, target)
        for index in product(*map(range, shape[:outer])):
            at = begin + sum(i * s for i, s in zip(index, target, strict=False))
            yield (
                first + sum(i * s for i, s in zip(index, source, strict=False)),
                self.want.buffer[at : at + size],
            )


class _Chunks:
    """The chunks of one file: read whole, as only these can be verified, the latest of them kept."""

    def __init__(self, files: Files, name: str, record: FileRecord) -> None:
        self._files, self._name, self._record, self._chunk_bytes = files, name, record, record.chunk_bytes
        self._scratch = memoryview(b"")
        self._kept = -1

    def copy(self, at: int, target: memoryview) -> None:
        """Fills `target` from byte `at` of the file on."""
        while target:
            index, skip = divmod(at, self._chunk_bytes)
            size = self._size(index)
            taken = min(len(target), size - skip)
            if taken == size and index != self._kept:
                self._read(index, target[:taken])
            else:
                target[:taken] = self._chunk(index)[skip : skip + taken]
            at += taken
            target = target[taken:]

    def damage(self, header: bytes) -> Iterator[CheckpointDamaged]:
        """Each chunk that is not as written; and the header, if it says something else than the manifest."""
        for index in range(len(self._record.checksums)):
            try:
                chunk = self._chunk(index)
            except CheckpointDamaged as error:
                yield error
                continue
            expected = memoryview(header)[index * self._chunk_bytes :][: len(chunk)]
            if chunk[: len(expected)] != expected:
                yield CheckpointDamaged(f"{self._files.where(self._name)}: its header contradicts the manifest")

    def _chunk(self, index: int) -> memoryview:
        if index != self._kept:
            if not self._scratch:
                self._scratch = memoryview(bytearray(self._size(0)))
            self._kept = -1
            self._read(index, self._scratch[: self._size(index)])
            self._kept = index
        return self._scratch[: self._size(index)]

    def _size(self, index: int) -> int:
        return min(self._chunk_bytes, self._record.size - index * self._chunk_bytes)

    def _read(self, index: int, buffer: memoryview) -> None:
        try:
            self._verified(index, buffer)
        except StoreError as error:
            error.file = self._record.name
            raise

    def _verified(self, index: int, buffer: memoryview) -> None:
        start = index * self._chunk_bytes
        got = self._files.read_into(self._name, start, buffer)
        where = self._files.where(self._name)
        if got is None:
            raise CheckpointDamaged(f"{where}: missing")
        if got < len(buffer):
            raise CheckpointDamaged(f"{where}: ends at byte {start + got}, {self._record.size} were written")
        if xxh3_64_hexdigest(buffer) != self._record.checksums[index]:
            raise CheckpointDamaged(f"{where}: bytes {start} to {start + got} are not what was written")


def _strides(shape: tuple[int, ...], item: int) -> list[int]:
    """Bytes from one index to the next, per dimension, of a row-major tensor."""
    strides: list[int] = []
    for side in reversed(shape):
        strides.append(item)
        item *= side
    return strides[::-1]


def _offset(inner: Box, outer: Box, strides: list[int]) -> int:
    """Bytes from the first element of `outer` to the first of `inner`."""
    return sum((a - b) * s for a, b, s in zip(inner.start, outer.start, strides, strict=True))
