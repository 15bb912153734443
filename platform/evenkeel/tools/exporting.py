"""What an exported folder has whatever its format: where it came from, its configuration, and how to load it."""

import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, fields
from typing import Any

from evenkeel.config import read_layer
from evenkeel.core.batches import batches
from evenkeel.core.boxes import Box, full
from evenkeel.store.checkpoint_reader import Checkpoint, Want
from evenkeel.store.errors import StoreError
from evenkeel.store.files import Files
from evenkeel.store.final import ITEM_BYTES
from evenkeel.store.journal import check_format
from evenkeel.store.manifest import SEEDS, TensorRecord
from evenkeel.store.untrusted import is_number, parse_json, short
from evenkeel.tools.describe import config_of

FORMAT = 1
CONFIG, ORIGIN, README = "config.json", "checkpoint.json", "README.md"
BLOCK_BYTES = 256 << 20
"""What is read and passed on at a time: many of the chunks that are verified, so that few are read twice."""


@dataclass(frozen=True, slots=True)
class Origin:
    """checkpoint.json: what tensors do not say of the state, and an import needs to go on from it."""

    step: int
    generation: int
    samples: int
    seed: int


def check_empty(files: Files) -> None:
    """Raises StoreError unless nothing is there: what is written must not be mixed with anything else."""
    if files.names("") or files.folders(""):
        raise StoreError(f"{files.where()}: is not empty; name a folder that is, or that does not exist")


def write_origin(files: Files, checkpoint: Checkpoint, readme: str) -> None:
    """config.json as final/ has it, checkpoint.json, and the text for README.md."""
    at, content = checkpoint.manifest.version, checkpoint.manifest.content
    origin = Origin(at.step, at.generation, content.samples, content.seed)
    files.replace(CONFIG, _json(config_of(checkpoint)))
    files.replace(ORIGIN, _json({"format": FORMAT, **asdict(origin)}))
    files.replace(README, readme.encode())


def read_origin(files: Files) -> tuple[Origin, str] | None:
    """What `write_origin` wrote, and the configuration as text; None for a folder that something else wrote.

    Raises:
        StoreError: if it is damaged, or of a newer format.
    """
    data, where = files.read(ORIGIN), files.where(ORIGIN)
    if data is None:
        return None
    try:
        values = parse_json(data)
        check_format(values, FORMAT, where)
        numbers = {field.name: values[field.name] for field in fields(Origin)}
    except (KeyError, TypeError, ValueError) as error:
        what = f"damaged: {type(error).__name__}: {short(error)}"
        raise StoreError(f"{where}: {what}; remove it to import the bare tensors") from None
    for name, value in numbers.items():
        if not (is_number(value) or (name == "seed" and type(value) is int and 0 <= value < SEEDS)):
            raise StoreError(f"{where}: {name} is {short(value, 60)}; expected a whole number")
    return Origin(**numbers), _read_config(files)


def _read_config(files: Files) -> str:
    """As YAML. Not as it stands there: where JSON has \\ud83d\\ude00, YAML knows no such pairs."""
    where = files.where(CONFIG)
    try:
        values = parse_json(files.read(CONFIG) or b"{}")
    except ValueError as error:
        raise StoreError(f"{where}: damaged: {error}; remove it to import without") from None
    text = json.dumps(values, ensure_ascii=False)
    read_layer(text, where)
    return text


def blocks(checkpoint: Checkpoint, tensors: Iterable[TensorRecord]) -> Iterator[tuple[str, memoryview]]:
    """Whole tensors in this order, row-major and verified: each by its name and some of its rows at a time.

    A block is memory of its own, which nobody writes to again.

    Raises:
        CheckpointDamaged, StoreError: as Checkpoint.read.
    """
    rows = (block for tensor in tensors for block in _rows(tensor))
    for batch in batches(rows, lambda block: block[2], BLOCK_BYTES):
        yield from _read(checkpoint, batch)


def _rows(tensor: TensorRecord) -> Iterator[tuple[str, Box, int]]:
    """Boxes of at most BLOCK_BYTES, or of one row, that make up the tensor, with their sizes in bytes."""
    whole = full(tensor.shape)
    if not whole.size or not tensor.shape:
        yield tensor.tensor, whole, whole.size * ITEM_BYTES[tensor.dtype]
        return
    rows = tensor.shape[0]
    row = whole.size // rows * ITEM_BYTES[tensor.dtype]
    some = max(1, BLOCK_BYTES // row)
    for first in range(0, rows, some):
        last = min(first + some, rows)
        yield tensor.tensor, Box((first, *whole.start[1:]), (last, *whole.stop[1:])), (last - first) * row


def _read(checkpoint: Checkpoint, batch: list[tuple[str, Box, int]]) -> Iterator[tuple[str, memoryview]]:
    """At once, so that a chunk that holds many small tensors is read and verified once."""
    buffer = memoryview(bytearray(sum(size for _, _, size in batch)))
    wants: list[Want] = []
    for tensor, box, size in batch:
        wants.append(Want(tensor, box, buffer[:size]))
        buffer = buffer[size:]
    checkpoint.read(wants)
    return ((want.tensor, want.buffer) for want in wants)


def _json(values: dict[str, Any]) -> bytes:
    return json.dumps(values, indent=2).encode() + b"\n"
