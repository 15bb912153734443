"""manifest.json of a checkpoint: what it holds, and where each slice of each tensor lies.

All that is read here may have been damaged or made up: whatever it says is checked before anything is believed, and
what passes describes files in the checkpoint's own folder whose every byte belongs to the header or to one slice.
"""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Any

from xxhash import xxh3_64_hexdigest

from evenkeel.core.boxes import Box
from evenkeel.core.codec import CodecError, dump, load
from evenkeel.core.ids import Version
from evenkeel.core.layout import Layout, check_layout
from evenkeel.plan.state import Slice
from evenkeel.store.checkpoint_tiling import check_tiling
from evenkeel.store.errors import StoreError
from evenkeel.store.final import ITEM_BYTES, TensorSpec, header
from evenkeel.store.journal import check_format
from evenkeel.store.untrusted import MAX_NUMBER, MAX_SIDES, parse_json, short

FORMAT = 1
NAME = "manifest.json"
CHUNK_BYTES = 8 << 20
"""What is checksummed, read and verified at a time, and so what a reader holds in memory."""
MAX_CHUNK_BYTES = 64 << 20
MAX_MANIFEST_BYTES = 64 << 20
"""Some 300,000 slices. What is larger is neither written nor read, as JSON takes many times its size when parsed."""
SEEDS = 2**64
MAX_NAME = 1000
"""Characters of a parameter's name."""
CHECKSUM = "xxh3_64"

_WORKER = re.compile(r"[A-Za-z0-9_.-]{1,100}")
_PART_NAME = re.compile(rf"g([0-9]{{1,19}})-{_WORKER.pattern}\.safetensors")
_TAIL = b',"digest":"%s"}'
"""The end of the file: the checksum of all before it."""
_DIGEST = re.compile(r"[0-9a-f]{16}")
_TENSOR_NAME = re.compile(rf"[a-z_]{{1,40}}/.{{1,{MAX_NAME}}}")


class CheckpointDamaged(StoreError):  # noqa: N818 - it says what the checkpoint is
    """A checkpoint is not what was written: the one before is to be taken. Names the file and what is wrong."""


@dataclass(frozen=True, slots=True)
class FileRecord:
    """One safetensors file of the checkpoint: its name in the folder, and a checksum per chunk of it, in order."""

    name: str
    size: int
    chunk_bytes: int
    checksums: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class SliceRecord:
    """A box of a tensor, row-major, at bytes start to stop (half-open) of a file."""

    file: str
    start: int
    stop: int
    box: Box


@dataclass(frozen=True, slots=True)
class TensorRecord:
    """One tensor, named "KIND/PARAMETER"; its slices cover each element once."""

    tensor: str
    dtype: str
    shape: tuple[int, ...]
    slices: tuple[SliceRecord, ...]


@dataclass(frozen=True, slots=True)
class Content:
    """What a checkpoint says of the run beside its tensors.

    Attributes:
        seed: run.seed; with `samples`, the number of samples used up so far, it is the whole position in the data.
        config: the resolved config, without secrets.
        layout: who held the state.
    """

    seed: int
    samples: int
    config: str
    layout: Layout


@dataclass(frozen=True)
class Manifest:
    """Valid by construction.

    Attributes:
        version: of the state; also what the checkpoint is known by, as a version is written at most once.
        epoch: of the controller that committed it.

    Raises:
        ValueError: if it contradicts itself, or names a file that is not plainly one of its own folder.
    """

    format: int
    version: Version
    epoch: int
    content: Content
    checksum: str
    files: tuple[FileRecord, ...]
    tensors: tuple[TensorRecord, ...]

    def __post_init__(self) -> None:
        if self.format != FORMAT:
            raise ValueError(f"format {self.format} is not {FORMAT}")
        if self.checksum != CHECKSUM:
            raise ValueError(f"checksum {self.checksum[:20]!r} is not {CHECKSUM}")
        _check_number(self.version.step, "step")
        _check_number(self.version.generation, "generation")
        _check_number(self.epoch, "epoch")
        _check_content(self.content)
        for file in self.files:
            _check_file(file, self.version)
        if len(self._by_name) != len(self.files):
            raise ValueError("two files have one name")
        if len(self._by_tensor) != len(self.tensors):
            raise ValueError("two tensors have one name")
        for tensor in self.tensors:
            _check_tensor(tensor)
        for name in self._in_file:
            self._check_places(self.file(name))

    @cached_property
    def _by_name(self) -> dict[str, FileRecord]:
        return {file.name: file for file in self.files}

    @cached_property
    def _by_tensor(self) -> dict[str, TensorRecord]:
        return {tensor.tensor: tensor for tensor in self.tensors}

    @cached_property
    def _in_file(self) -> dict[str, list[tuple[TensorRecord, SliceRecord]]]:
        found: dict[str, list[tuple[TensorRecord, SliceRecord]]] = {file.name: [] for file in self.files}
        for tensor in self.tensors:
            for piece in tensor.slices:
                if piece.file not in found:
                    raise ValueError(f"tensor {tensor.tensor!r}: file {piece.file!r} is not among the files")
                found[piece.file].append((tensor, piece))
        for pieces in found.values():
            pieces.sort(key=lambda of: order(of[0].dtype, of[0].tensor, of[1].box))
        return found

    def file(self, name: str) -> FileRecord:
        return self._by_name[name]

    def tensor(self, name: str) -> TensorRecord:
        """Raises KeyError for a tensor that the checkpoint does not have."""
        return self._by_tensor[name]

    def slices(self) -> Iterator[Slice]:
        """All that the checkpoint holds, as plan/reshard.py takes it: a checkpoint is one more holder."""
        return (Slice(tensor.tensor, piece.box) for tensor in self.tensors for piece in tensor.slices)

    def header(self, file: str) -> bytes:
        """The head that the safetensors file must have, byte by byte."""
        return header([spec(t.tensor, t.dtype, piece.box) for t, piece in self._in_file[file]])

    def _check_places(self, file: FileRecord) -> None:
        """A file is its header and then its slices, in their order, without a gap and to the end."""
        at = len(self.header(file.name))
        for tensor, piece in self._in_file[file.name]:
            if piece.start != at or piece.stop != at + piece.box.size * ITEM_BYTES[tensor.dtype]:
                where = f"tensor {tensor.tensor!r}, {file.name}"
                raise ValueError(f"{where}: bytes {piece.start} to {piece.stop} are not those of its box at {at}")
            at = piece.stop
        if at != file.size:
            raise ValueError(f"{file.name}: has {file.size} bytes, its slices end at {at}")


def part_name(version: Version, worker: str) -> str:
    """The file of one worker. No two workers, and no two tries at a step, write the same file.

    Raises:
        ValueError: for a worker whose name cannot be a part of a file name.
    """
    if not _WORKER.fullmatch(worker):
        raise ValueError(f"worker {worker!r}: a file cannot be named after it")
    return f"g{version.generation}-{worker}.safetensors"


def part_generation(name: str) -> int | None:
    """The generation whose part the file of that name is; None if it is something else."""
    match = _PART_NAME.fullmatch(name)
    return int(match[1]) if match else None


def spec(tensor: str, dtype: str, box: Box) -> TensorSpec:
    """A slice as safetensors has it: a tensor of its own, named "KIND/PARAMETER[START:STOP,...]"."""
    ranges = ",".join(f"{a}:{b}" for a, b in zip(box.start, box.stop, strict=True))
    return TensorSpec(f"{tensor}[{ranges}]", dtype, box.shape)


def order(dtype: str, tensor: str, box: Box) -> tuple[int, str, Box]:
    """Sorts the slices of a file. Wide elements come first, so that each is aligned as readers that map files need."""
    return -ITEM_BYTES[dtype], tensor, box


def to_json(manifest: Manifest) -> bytes:
    text = json.dumps(dump(manifest, Manifest), separators=(",", ":")).encode().removesuffix(b"}")
    return text + _TAIL % xxh3_64_hexdigest(text).encode()


def from_json(data: bytes, where: str) -> Manifest:
    """The manifest that the file `where` holds.

    Raises:
        StoreError: if its format is newer than this code.
        CheckpointDamaged: if it is anything but a valid manifest.
    """
    size = len(_TAIL % b"") + 16
    text, tail = memoryview(data)[:-size], data[-size:]
    # Looked at before the format, which may have been flipped too: so all formats must end like this.
    if tail != _TAIL % xxh3_64_hexdigest(text).encode():
        raise CheckpointDamaged(f"{where}: is not what was written")
    try:
        values = parse_json(data, object_pairs_hook=_object, parse_constant=_constant)
    except ValueError as error:
        raise CheckpointDamaged(f"{where}: {error}") from None
    if not isinstance(values, dict) or type(values.get("format")) is not int:
        raise CheckpointDamaged(f"{where}: has no format version")
    check_format(values, FORMAT, where)
    del values["digest"]
    try:
        manifest: Manifest = load(values, Manifest)
    except (CodecError, ValueError) as error:
        raise CheckpointDamaged(f"{where}: {short(error)}") from None
    return manifest


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"key {key!r} is there twice")
        found[key] = value
    return found


def _constant(word: str) -> Any:
    raise ValueError(f"{word} is not a number")


def _check_number(value: int, name: str) -> None:
    if not 0 <= value <= MAX_NUMBER:
        raise ValueError(f"{name} {value} is not 0 to {MAX_NUMBER}")


def _check_content(content: Content) -> None:
    _check_number(content.samples, "samples")
    if not 0 <= content.seed < SEEDS:
        raise ValueError(f"seed {content.seed} is not 0 to {SEEDS - 1}")
    content.config.encode()  # JSON can say half a surrogate pair, which nothing can print
    pipelines = content.layout.pipelines
    if not pipelines or not all(pipeline.stages for pipeline in pipelines):
        raise ValueError("layout: a pipeline or a stage is missing")
    _check_number(pipelines[0].stages[-1].stop, "layout: depth")
    _check_number(pipelines[-1].micro_stop, "layout: micro-batches")
    check_layout(content.layout, pipelines[0].stages[-1].stop, pipelines[-1].micro_stop)
    for worker in content.layout.members:
        if not _WORKER.fullmatch(worker):
            raise ValueError(f"layout: {worker[:80]!r} is not the name of a worker")


def _check_file(file: FileRecord, version: Version) -> None:
    generation = part_generation(file.name)
    if generation is None:
        raise ValueError(f"file name {file.name[:80]!r} is not that of a part")
    if generation != version.generation:
        raise ValueError(f"{file.name}: is not of generation {version.generation}")
    _check_number(file.size, f"{file.name}: size")
    if not 0 < file.chunk_bytes <= MAX_CHUNK_BYTES:
        raise ValueError(f"{file.name}: chunk_bytes {file.chunk_bytes} is not 1 to {MAX_CHUNK_BYTES}")
    chunks = -(-file.size // file.chunk_bytes)
    if len(file.checksums) != chunks:
        raise ValueError(f"{file.name}: {len(file.checksums)} checksums, {chunks} expected")
    if not all(map(_DIGEST.fullmatch, file.checksums)):
        raise ValueError(f"{file.name}: a checksum is not 16 hexadecimal digits")


def _check_tensor(tensor: TensorRecord) -> None:
    name = repr(tensor.tensor[:80])
    if not _TENSOR_NAME.fullmatch(tensor.tensor) or not tensor.tensor.isprintable():
        raise ValueError(f"tensor name {name} is not KIND/PARAMETER")
    if tensor.dtype not in ITEM_BYTES:
        raise ValueError(f"tensor {name}: dtype {tensor.dtype[:20]!r} is not one of {', '.join(ITEM_BYTES)}")
    for side in tensor.shape:
        _check_number(side, f"tensor {name}: a side")
    if len(tensor.shape) > MAX_SIDES or prod(tensor.shape) > MAX_NUMBER:
        raise ValueError(f"tensor {name}: shape is too large")
    try:
        check_tiling([piece.box for piece in tensor.slices], tensor.shape)
    except ValueError as error:
        raise ValueError(f"tensor {name}: {error}") from None
