"""torch.distributed.checkpoint's format, by its public interfaces, in one process and one tensor at a time.

Keys are those of {"model": ..., "optim": ...} with what torch.distributed.checkpoint.state_dict.get_state_dict gives:
model.NAME, optim.state.NAME.exp_avg, .exp_avg_sq and .step (a float32 scalar, as torch.optim.AdamW has it).
"""

import io
import pickle
import pickletools
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from math import isfinite, prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from evenkeel.core.boxes import Box, full
from evenkeel.store.checkpoint_reader import Checkpoint, Want
from evenkeel.store.checkpoint_tiling import check_tiling
from evenkeel.store.errors import StoreError
from evenkeel.store.files import LocalFiles
from evenkeel.store.manifest import TensorRecord
from evenkeel.store.untrusted import MAX_NUMBER, MAX_SIDES, is_number, short
from evenkeel.tools.exporting import check_empty, read_origin, write_origin
from evenkeel.tools.importing import Foreign, Source
from evenkeel.tools.text import Advance

DTYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
METADATA = ".metadata"

README = """\
# Step {step} of a training run, as torch.distributed.checkpoint has it

Keys: `model.NAME`; `optim.state.NAME.exp_avg`, `.exp_avg_sq` and `.step` (not there if only weights were exported).
`config.json` is the configuration of the run, `checkpoint.json` the step and how many samples of the data were used.

```python
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

weights, optim = get_state_dict(model, optimizer)  # of a torch.optim.AdamW
state = {{"model": weights, "optim": optim}}
# Learning rate and the like stay those of `optimizer`: they are not here.
dcp.load(state, checkpoint_id=".", planner=dcp.DefaultLoadPlanner(allow_partial_load=True))
set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optim"])
```
"""


# ---------------------------------------------------------------- out


def export(checkpoint: Checkpoint, to: LocalFiles, weights_only: bool, tell: Advance) -> None:
    """Writes the folder; .metadata comes last, so where it is the folder is whole.

    Raises:
        StoreError: if the folder is not empty, or a store fails.
        CheckpointDamaged: if the checkpoint is; .metadata is not there then.
    """
    check_empty(to)
    step = checkpoint.manifest.version.step
    write_origin(to, checkpoint, README.format(step=step))
    state: dict[str, Any] = {"model": {}}
    records: dict[str, TensorRecord] = {}
    for record in checkpoint.manifest.tensors:
        kind, _, name = record.tensor.partition("/")
        if weights_only and kind != "param":
            continue
        records[_key(kind, name)] = record
        empty = torch.empty(record.shape, dtype=DTYPES[record.dtype], device="meta")
        if kind == "param":
            state["model"][name] = empty
        else:
            moments = state.setdefault("optim", {"state": {}})["state"]
            moments.setdefault(name, {"step": torch.tensor(float(step))})[kind] = empty
    # One file per tensor, because torch keeps all of a file's tensors in memory until the file is whole.
    writer = FileSystemWriter(to.root, single_file_per_rank=False, per_thread_copy_ahead=0, overwrite=False)
    with _alone(to.where()):
        save(state, storage_writer=writer, planner=_Planner(checkpoint, records, tell), no_dist=True)


class _Planner(DefaultSavePlanner):
    """Plans with tensors that have no memory, and reads each when it is to be written."""

    def __init__(self, checkpoint: Checkpoint, records: Mapping[str, TensorRecord], tell: Advance) -> None:
        super().__init__()
        self._checkpoint, self._records, self._tell = checkpoint, records, tell

    def lookup_object(self, index: MetadataIndex) -> Any:
        record = self._records.get(index.fqn)
        if record is None:
            return super().lookup_object(index)
        tensor = torch.empty(record.shape, dtype=DTYPES[record.dtype])
        self._checkpoint.read([Want(record.tensor, full(record.shape), _bytes(tensor))])
        self._tell(tensor.nbytes)
        return tensor


def _key(kind: str, name: str) -> str:
    return f"model.{name}" if kind == "param" else f"optim.state.{name}.{kind}"


# ---------------------------------------------------------------- in


_OPTIMIZER = re.compile(r"(?:optim|optimizer)\.state\.(.+)\.([a-z_]+)")


def source(folder: LocalFiles, weights_only: bool) -> Source:
    """Keys as `export` writes them; also with optimizer. for optim., all below app., or weights without model.

    Whatever else is there (data loaders, schedulers, parameter groups) is left.

    Raises:
        StoreError: if the folder is not such a checkpoint, or cannot be read.
    """
    reader = _Reader(folder)
    found = _checked(folder, reader.metadata)
    bare = {key.removeprefix("app."): key for key in found}
    prefix = "model." if any(key.startswith("model.") for key in bare) else ""
    tensors: list[Foreign] = []
    steps: set[int] = set()
    for key, stored in bare.items():
        moment = _OPTIMIZER.fullmatch(key)
        if moment and moment[2] == "step" and not weights_only:
            steps.add(_step(reader, stored, found[stored]))
        elif moment and moment[2] != "step" and not weights_only:
            tensors.append(_foreign(reader, f"{moment[2]}/{moment[1]}", stored, found[stored]))
        elif not moment and key.startswith(prefix):
            tensors.append(_foreign(reader, f"param/{key.removeprefix(prefix)}", stored, found[stored]))
    origin, config = read_origin(folder) or (None, "")
    step = origin.step if origin else _one_step(steps, folder.where())
    return Source(folder.where(), tensors, step, origin, config)


def _step(reader: "_Reader", key: str, stored: TensorStorageMetadata) -> int:
    where, dtype = f"{reader.where}: {short(key)!r}", stored.properties.dtype
    said = f"{dtype} of shape {short(list(stored.size))}"
    if prod(stored.size) == 1 and (dtype in NAMES or dtype in (torch.int32, torch.int64)):
        _check_chunks(stored, where)
        value = reader.tensor(key, stored).item()
        if isfinite(value) and is_number(int(value)) and value == int(value):
            return int(value)
        said = f"{value:g}"
    what = f"AdamW's step must be one whole number, 0 to {MAX_NUMBER}; --weights-only begins anew without it"
    raise StoreError(f"{where} is {said}: {what}")


def _one_step(steps: set[int], where: str) -> int | None:
    if len(steps) > 1:
        steps_text = f"{min(steps)} to {max(steps)}"
        raise StoreError(f"{where}: the parameters' AdamW steps differ, {steps_text}; evenkeel has one")
    return steps.pop() if steps else None


def _foreign(reader: "_Reader", tensor: str, key: str, stored: TensorStorageMetadata) -> Foreign:
    dtype = NAMES.get(stored.properties.dtype)
    where = f"{reader.where}: {short(key)!r}"
    if dtype is None:
        raise StoreError(f"{where} has dtype {stored.properties.dtype}, which is not that of a parameter")
    _check_chunks(stored, where)
    return Foreign(tensor, dtype, tuple(stored.size), where, lambda: _bytes(reader.tensor(key, stored)))


def _check_chunks(stored: TensorStorageMetadata, where: str) -> None:
    try:
        check_tiling([Box(tuple(c.offsets), tuple(_stop(c))) for c in stored.chunks], tuple(stored.size))
    except ValueError as error:
        raise StoreError(f"{where}: {short(error)}") from None


def _stop(chunk: Any) -> Iterator[int]:
    return (a + n for a, n in zip(chunk.offsets, chunk.sizes, strict=True))


def _checked(folder: LocalFiles, metadata: Metadata) -> dict[str, TensorStorageMetadata]:
    """The tensors by key. Nothing said of them is believed: torch would open any file, and make room for any size.

    Raises:
        StoreError: naming .metadata, if they are in files that are not in the folder, or are more than these hold.
    """
    where, held = folder.where(METADATA), folder.sizes("")
    try:
        for stored in metadata.storage_data.values():
            if (name := stored.relative_path) not in held:
                raise StoreError(f"{where}: there are data in {short(name)!r}, which is missing in the folder")
        found = {k: v for k, v in metadata.state_dict_metadata.items() if isinstance(v, TensorStorageMetadata)}
        for key, tensor in found.items():
            if not isinstance(tensor.properties.dtype, torch.dtype):
                raise TypeError(f"{short(key)!r}: its dtype is a {type(tensor.properties.dtype).__name__}")
            boxes = [tensor.size, *(numbers for chunk in tensor.chunks for numbers in (chunk.offsets, chunk.sizes))]
            if not isinstance(key, str) or not all(is_number(n) for numbers in boxes for n in numbers):
                what = f"sizes and offsets must be whole numbers, not negative, to {MAX_NUMBER}"
                raise StoreError(f"{where}: {short(key)!r}: {what}")
            if len(tensor.size) > MAX_SIDES or prod(tensor.size) > MAX_NUMBER:
                raise StoreError(f"{where}: {short(key)!r}: its size {short(list(tensor.size))} is too large")
        said = sum(prod(tensor.size) * tensor.properties.dtype.itemsize for tensor in found.values())
    except (AttributeError, TypeError, ValueError) as error:
        raise StoreError(f"{where}: damaged: {type(error).__name__}: {short(error)}") from None
    if said > (there := sum(held.values())):
        raise StoreError(f"{where}: tensors of {said} bytes in files of {there}; a file is missing or cut")
    return found


class _Reader(FileSystemReader):
    """Reads the metadata once; one tensor per load."""

    def __init__(self, folder: LocalFiles) -> None:
        super().__init__(folder.root)
        self.where = folder.where()
        self.metadata = _read_metadata(folder.root / METADATA)

    def read_metadata(self, *_: Any, **__: Any) -> Metadata:
        return self.metadata

    def tensor(self, key: str, stored: TensorStorageMetadata) -> Tensor:
        """Raises StoreError where torch cannot read it."""
        tensor = torch.empty(stored.size, dtype=stored.properties.dtype)
        with _alone(f"{self.where}: {short(key)!r}"):
            load({key: tensor}, storage_reader=self, planner=DefaultLoadPlanner(flatten_state_dict=False), no_dist=True)
        return tensor


_KNOWN = {
    *(("torch.distributed.checkpoint.metadata", name) for name in (
        "BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta", "TensorProperties",
        "TensorStorageMetadata", "_MEM_FORMAT_ENCODING",
    )),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    ("collections", "OrderedDict"),
    ("pathlib", "Path"),
    ("pathlib", "PosixPath"),
    ("pathlib._local", "PosixPath"),
}  # fmt: skip
"""What the metadata that torch 2.13 writes consists of, dtypes aside."""


class _Unpickler(pickle.Unpickler):
    """torch reads .metadata with pickle, which would run whatever the file says: here it makes nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        found = super().find_class(module, name) if (module, name) in _KNOWN or module == "torch" else None
        if (module, name) in _KNOWN or isinstance(found, torch.dtype):
            return found
        raise pickle.UnpicklingError(f"{module}.{name} does not belong there")


def _read_metadata(path: Path) -> Metadata:
    try:
        data = path.read_bytes()
        _check_memo(data)
        metadata = _Unpickler(io.BytesIO(data)).load()
    except FileNotFoundError:
        raise StoreError(f"{path}: missing, so this is no checkpoint of torch.distributed.checkpoint") from None
    except Exception as error:  # a damaged pickle raises anything
        raise StoreError(f"{path}: cannot be read: {type(error).__name__}: {short(error)}") from None
    if not isinstance(metadata, Metadata):
        raise StoreError(f"{path}: holds a {type(metadata).__name__}, no metadata")
    return metadata


def _check_memo(data: bytes) -> None:
    """Raises UnpicklingError if a pickle numbers what it notes past its own length: pickle makes room up to there."""
    for code, number, _ in pickletools.genops(data):
        if "PUT" in code.name and isinstance(number, int) and number > len(data):
            raise pickle.UnpicklingError(f"notes a value as number {number} in {len(data)} bytes")


# ---------------------------------------------------------------- both


def _bytes(tensor: Tensor) -> memoryview:
    """Of a contiguous tensor on CPU; the same memory."""
    return memoryview(tensor.reshape(-1).view(torch.uint8).numpy().data)


@contextmanager
def _alone(where: str) -> Iterator[None]:
    """Without torch's warning that there is just one process; its errors become the one that caused them."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        try:
            yield
        except CheckpointException as error:
            cause = next(exception for exception, _ in error.failures.values())
            if isinstance(cause, StoreError) or not isinstance(cause, Exception):
                raise cause from None
            raise StoreError(f"{where}: {type(cause).__name__}: {short(cause)}") from cause
