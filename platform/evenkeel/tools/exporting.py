"""What an exported folder has whatever its format: where it came from, its configuration, and how to load it."""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from typing import Any

from evenkeel.core.boxes import Box, full
from evenkeel.store.checkpoint_reader import Checkpoint, Want
from evenkeel.store.errors import StoreError
from evenkeel.store.files import Files, LocalFiles
from evenkeel.store.final import ITEM_BYTES
from evenkeel.store.journal import check_format
from evenkeel.store.manifest import TensorRecord
from evenkeel.tools.describe import config_of

FORMAT = 1
CONFIG, ORIGIN, README = "config.json", "checkpoint.json", "README.md"
BLOCK_BYTES = 256 << 20
"""What is read and passed on at a time: a multiple of the chunks that are verified, so that few are read twice."""


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


def sizes(files: Files) -> dict[str, int]:
    """Bytes of each file of the folder itself."""
    # LocalFiles takes "" + "/" + a name for an absolute path, ObjectFiles knows no ".".
    return files.sizes("." if isinstance(files, LocalFiles) else "")


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
        values = json.loads(data)
        check_format(values, FORMAT, where)
        numbers = {field.name: values[field.name] for field in fields(Origin)}
        config = (files.read(CONFIG) or b"{}").decode()
    except (KeyError, TypeError, ValueError) as error:
        what = f"damaged: {type(error).__name__}: {error}"
        raise StoreError(f"{where}: {what}; remove it to import the bare tensors") from None
    for name, value in numbers.items():
        if type(value) is not int or value < 0:
            raise StoreError(f"{where}: {name} is {value!r}; expected a whole number")
    return Origin(**numbers), config


def blocks(checkpoint: Checkpoint, tensor: TensorRecord) -> Iterator[memoryview]:
    """The bytes of a whole tensor, row-major and verified, some rows at a time, in one buffer that is used again.

    Raises:
        CheckpointDamaged, StoreError: as Checkpoint.read.
    """
    whole, item = full(tensor.shape), ITEM_BYTES[tensor.dtype]
    if not whole.size:
        return
    rows = tensor.shape[0] if tensor.shape else 1
    row = whole.size // rows * item
    some = min(rows, max(1, BLOCK_BYTES // row))
    buffer = memoryview(bytearray(some * row))
    for first in range(0, rows, some):
        last = min(first + some, rows)
        box = Box((first, *whole.start[1:]), (last, *whole.stop[1:])) if tensor.shape else whole
        part = buffer[: (last - first) * row]
        checkpoint.read([Want(tensor.tensor, box, part)])
        yield part


def _json(values: dict[str, Any]) -> bytes:
    return json.dumps(values, indent=2).encode() + b"\n"
