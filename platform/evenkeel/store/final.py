"""The trained model as final/model.safetensors, written as a stream: nobody holds a whole model."""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from typing import Any

from evenkeel.store.files import Files, Sink

MODEL = "final/model.safetensors"
CONFIG = "final/config.json"
ITEM_BYTES = {"F64": 8, "F32": 4, "BF16": 2, "F16": 2}


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One tensor of the file; `dtype` as safetensors names it, such as "F32"."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """In bytes."""
        return prod(self.shape) * ITEM_BYTES[self.dtype]


class FinalWriter:
    """Takes the bytes of the tensors in the order of their specs, each in as many pieces as it comes in."""

    def __init__(self, file: Sink, specs: Sequence[TensorSpec]) -> None:
        self._file, self._specs = file, specs
        self._at = 0
        self._filled = 0
        file.write(header(specs))

    def write(self, name: str, data: bytes | memoryview) -> None:
        """Appends to the tensor `name`: contiguous, little-endian; must not change until the file is whole (see Sink).

        Raises:
            ValueError: if another tensor comes next, or this one gets more bytes than it has.
        """
        while self._at < len(self._specs) and self._filled == self._specs[self._at].size:
            self._at, self._filled = self._at + 1, 0
        if self._at == len(self._specs) or self._specs[self._at].name != name:
            expected = self._specs[self._at].name if self._at < len(self._specs) else "nothing"
            raise ValueError(f"tensor {name} is written where {expected} comes next")
        view = memoryview(data).cast("B") if len(data) else memoryview(b"")
        self._filled += len(view)
        if self._filled > self._specs[self._at].size:
            raise ValueError(f"tensor {name} has {self._specs[self._at].size} bytes, {self._filled} were written")
        self._file.write(view)

    def check_complete(self) -> None:
        """Raises ValueError if bytes are missing."""
        rest = self._specs[self._at :]
        missing = sum(spec.size for spec in rest) - self._filled
        if missing:
            raise ValueError(f"{missing} bytes from tensor {rest[0].name} on were never written")


@contextmanager
def final_writer(files: Files, specs: Sequence[TensorSpec], config: Mapping[str, Any]) -> Iterator[FinalWriter]:
    """Both files of final/. The model appears when the block ends well, after config.json: it exists = it is whole.

    Raises:
        ValueError: as FinalWriter, or if names repeat or a dtype is unknown.
        StoreError: if the store fails.
    """
    files.replace(CONFIG, json.dumps(config, indent=2).encode() + b"\n")
    with files.stream(MODEL) as file:
        writer = FinalWriter(file, specs)
        yield writer
        writer.check_complete()


def header(specs: Sequence[TensorSpec]) -> bytes:
    """The head of a safetensors file: length (8 bytes, little-endian), then JSON, padded so that data is aligned."""
    if len({spec.name for spec in specs}) != len(specs):
        raise ValueError("two tensors have one name")
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for spec in specs:
        if spec.dtype not in ITEM_BYTES:
            raise ValueError(f"tensor {spec.name} has dtype {spec.dtype}; expected one of {', '.join(ITEM_BYTES)}")
        entries[spec.name] = {
            "dtype": spec.dtype,
            "shape": list(spec.shape),
            "data_offsets": [offset, offset + spec.size],
        }
        offset += spec.size
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
