"""Folders of safetensors files that plain PyTorch loads: model.safetensors, and optimizer.safetensors beside it.

Written and read as streams of bytes, on any store; torch is not needed, and bfloat16 is no special case.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import Any

from evenkeel.store.checkpoint_reader import Checkpoint
from evenkeel.store.errors import StoreError
from evenkeel.store.files import Files
from evenkeel.store.final import ITEM_BYTES, FinalWriter, TensorSpec
from evenkeel.store.manifest import MAX_NAME, TensorRecord
from evenkeel.store.untrusted import MAX_NUMBER, MAX_SIDES, is_number, parse_json, short
from evenkeel.tools.exporting import blocks, check_empty, read_origin, write_origin
from evenkeel.tools.importing import Foreign, Source
from evenkeel.tools.text import Advance

MODEL, OPTIMIZER = "model.safetensors", "optimizer.safetensors"
MAX_HEADER_BYTES = 100_000_000
"""The safetensors library's own limit."""

README = """\
# Step {step} of a training run

- `model.safetensors`: the weights, each by its full name
- `optimizer.safetensors`: AdamW's moments, as `exp_avg/NAME` and `exp_avg_sq/NAME`; not there if weights only are
- `config.json`: the configuration of the run
- `checkpoint.json`: the step, and how many samples of the data were used

```python
from safetensors.torch import load_file

weights = load_file("model.safetensors")
model.load_state_dict(weights)

moments = load_file("optimizer.safetensors")
for name, parameter in model.named_parameters():  # of a torch.optim.AdamW, to train on from step {step}
    optimizer.state[parameter] = {{
        "step": torch.tensor({step}.0),
        "exp_avg": moments[f"exp_avg/{{name}}"],
        "exp_avg_sq": moments[f"exp_avg_sq/{{name}}"],
    }}
```
"""


# ---------------------------------------------------------------- out


def export(checkpoint: Checkpoint, to: Files, weights_only: bool, tell: Advance) -> None:
    """Writes the folder; model.safetensors comes last, so where it is the folder is whole.

    Raises:
        StoreError: if the folder is not empty, or a store fails.
        CheckpointDamaged: if the checkpoint is; model.safetensors is not there then.
    """
    check_empty(to)
    write_origin(to, checkpoint, README.format(step=checkpoint.manifest.version.step))
    weights = [t for t in checkpoint.manifest.tensors if t.tensor.startswith("param/")]
    if not weights_only:
        moments = [t for t in checkpoint.manifest.tensors if not t.tensor.startswith("param/")]
        _write(checkpoint, to, OPTIMIZER, {t.tensor: t for t in moments}, tell)
    _write(checkpoint, to, MODEL, {t.tensor.partition("/")[2]: t for t in weights}, tell)


def _write(checkpoint: Checkpoint, to: Files, name: str, tensors: dict[str, TensorRecord], tell: Advance) -> None:
    # Wide elements first, so that each is aligned as readers that map files need.
    order = sorted(tensors, key=lambda n: (-ITEM_BYTES[tensors[n].dtype], n))
    specs = [TensorSpec(n, tensors[n].dtype, tensors[n].shape) for n in order]
    with to.stream(name) as file:
        writer = FinalWriter(file, specs)
        names = {tensor.tensor: n for n, tensor in tensors.items()}
        for tensor, block in blocks(checkpoint, (tensors[n] for n in order)):
            if block:
                writer.write(names[tensor], block)
            tell(len(block))
        writer.check_complete()


# ---------------------------------------------------------------- in


@dataclass(frozen=True, slots=True)
class Entry:
    """A tensor of a safetensors file, at bytes start to stop (half-open) of it."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


def source(folder: Files, weights_only: bool) -> Source:
    """All of model*.safetensors, which may be several files, and of optimizer*.safetensors unless only weights count.

    Raises:
        StoreError: if there are none, or a header is not that of a safetensors file; names file and tensor.
    """
    found = {name: size for name, size in folder.sizes("").items() if name.endswith(".safetensors")}
    models = [name for name in found if name.startswith("model")]
    if not models:
        raise StoreError(f"{folder.where()}: there is no {MODEL}, and no model-*.safetensors")
    tensors = [foreign for name in models for foreign in _tensors(folder, name, found[name], "param/")]
    if not weights_only:
        moments = [name for name in found if name.startswith("optimizer")]
        tensors += [foreign for name in moments for foreign in _tensors(folder, name, found[name], "")]
    origin, config = read_origin(folder) or (None, "")
    return Source(folder.where(), tensors, origin.step if origin else None, origin, config)


def _tensors(folder: Files, name: str, size: int, prefix: str) -> Iterator[Foreign]:
    for entry in read_header(folder, name, size):
        read = partial(_bytes, folder, name, entry.start, entry.stop - entry.start)
        yield Foreign(prefix + entry.name, entry.dtype, entry.shape, folder.where(name), read)


def read_header(files: Files, name: str, size: int) -> list[Entry]:
    """The tensors of a safetensors file of so many bytes; anything may be in it.

    Raises:
        StoreError: naming the file, and the tensor where it is one's fault.
    """
    where = files.where(name)
    length = int.from_bytes(_bytes(files, name, 0, 8), "little") if size >= 8 else size
    if not 0 < length <= min(MAX_HEADER_BYTES, size - 8):
        raise StoreError(f"{where}: is not a safetensors file: a header of {length} bytes in a file of {size}")
    try:
        values = parse_json(bytes(_bytes(files, name, 8, length)))
    except ValueError as error:
        raise StoreError(f"{where}: its header is {error}") from None
    if not isinstance(values, dict):
        raise StoreError(f"{where}: its header is not a JSON object")
    values.pop("__metadata__", None)
    entries = sorted((_entry(n, v, 8 + length, where) for n, v in values.items()), key=lambda e: (e.start, e.stop))
    at = 8 + length
    for entry in entries:
        if entry.start != at:
            raise StoreError(f"{where}: tensor {entry.name!r} begins at byte {entry.start}, not at {at}")
        at = entry.stop
    if at != size:
        raise StoreError(f"{where}: has {size} bytes, its tensors end at {at}; it may be cut")
    return entries


def _entry(name: str, value: Any, data: int, where: str) -> Entry:
    """Args: data: where the tensors' bytes begin in the file."""
    tensor = f"{where}: tensor {name[:200]!r}"
    if not 0 < len(name) <= MAX_NAME or not name.isprintable():
        raise StoreError(f"{tensor}: its name is not one of 1 to {MAX_NAME} printable characters")
    try:
        dtype, shape, (start, stop) = value["dtype"], value["shape"], value["data_offsets"]
    except (KeyError, TypeError, ValueError):
        raise StoreError(f"{tensor}: has no dtype, shape and data_offsets") from None
    if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
        raise StoreError(f"{tensor}: dtype {str(dtype)[:20]!r} is not that of a parameter ({', '.join(ITEM_BYTES)})")
    if not isinstance(shape, list) or len(shape) > MAX_SIDES:
        raise StoreError(f"{tensor}: shape must be a list of at most {MAX_SIDES} sides")
    if not all(map(is_number, (*shape, start, stop))):
        raise StoreError(f"{tensor}: shape and data_offsets must be whole numbers, not negative, to {MAX_NUMBER}")
    if stop - start != prod(shape) * ITEM_BYTES[dtype]:
        raise StoreError(f"{tensor}: {stop - start} bytes are not those of {dtype} {short(shape)}")
    return Entry(name, dtype, tuple(shape), data + start, data + stop)


def _bytes(files: Files, name: str, start: int, size: int) -> memoryview:
    buffer = memoryview(bytearray(size))
    got = files.read_into(name, start, buffer) if size else 0
    if got != size:
        raise StoreError(f"{files.where(name)}: ends before byte {start + size}; was it changed just now?")
    return buffer
