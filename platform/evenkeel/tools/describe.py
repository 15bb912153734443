"""What one checkpoint holds: who held the state, its tensors and files, and the run that it is of."""

import re
from collections import Counter
from math import prod
from typing import Any

from omegaconf import OmegaConf

from evenkeel.config import FINGERPRINT, read_layer
from evenkeel.config_values import ConfigError, flatten
from evenkeel.core.layout import Layout, segments
from evenkeel.store.checkpoint_reader import Checkpoint
from evenkeel.store.final import ITEM_BYTES
from evenkeel.store.manifest import TensorRecord
from evenkeel.store.run_directory import layout_record
from evenkeel.tools.text import aligned, size_text

SHOWN = ("run.name", "model.", "data.name", "train.")
"""Keys of the configuration, or their beginnings, that `inspect` shows: what the tensors are and what made them."""


def record(checkpoint: Checkpoint, distrusted: str) -> dict[str, Any]:
    """All of it, for JSON.

    Args:
        distrusted: why, in one line; "" if it is not.
    """
    manifest, at = checkpoint.manifest, checkpoint.manifest.version
    slices = Counter(piece.file for tensor in manifest.tensors for piece in tensor.slices)
    return {
        "checkpoint": checkpoint.url,
        "step": at.step,
        "generation": at.generation,
        "seed": manifest.content.seed,
        "samples": manifest.content.samples,
        "parameters": parameters(checkpoint),
        "distrusted": distrusted,
        "bytes": sum(file.size for file in manifest.files),
        "layout": layout_record(manifest.content.layout),
        "files": [{"name": f.name, "bytes": f.size, "slices": slices[f.name]} for f in manifest.files],
        "tensors": [
            {
                "name": t.tensor,
                "dtype": t.dtype,
                "shape": list(t.shape),
                "slices": len(t.slices),
                "bytes": tensor_bytes(t),
            }
            for t in manifest.tensors
        ],
        "config": config_of(checkpoint),
    }


def description(checkpoint: Checkpoint, distrusted: str) -> str:
    """The same in words, with a picture of the layout."""
    manifest, at, content = checkpoint.manifest, checkpoint.manifest.version, checkpoint.manifest.content
    total = sum(file.size for file in manifest.files)
    slices = Counter(piece.file for tensor in manifest.tensors for piece in tensor.slices)
    files = [(f.name, size_text(f.size), str(slices[f.name])) for f in manifest.files]
    head = [
        f"checkpoint  {checkpoint.url}",
        f"version     step {at.step}, generation {at.generation}; {content.samples} samples used, seed {content.seed}",
        f"holds       {parameters(checkpoint):,} parameters in {len(manifest.tensors)} tensors, "
        f"{size_text(total)} in {len(manifest.files)} files",
        *([f"distrusted  {distrusted}"] if distrusted else []),
    ]
    shown = [f"{key}: {value}" for key, value in flatten(config_of(checkpoint)).items() if key.startswith(SHOWN)]
    return "\n".join(
        [
            *head,
            *_section("held by", picture(content.layout)),
            *_section("files", aligned(("name", "size", "slices"), files, ("size", "slices"))),
            *_section("tensors", _tensor_lines(manifest.tensors)),
            *_section("config", shown),
        ]
    )


def picture(layout: Layout) -> list[str]:
    """One row per pipeline, one column per run of layers that no pipeline cuts, workers where they stood.

        layers 0:2  2:3     3:6
        0      w0001 w0002  w0003
    """
    columns = [f"{start}:{stop}" for start, stop in segments(layout)]
    starts = [start for start, _ in segments(layout)]
    stops = [stop for _, stop in segments(layout)]
    cells: list[list[tuple[int, int, str]]] = []
    for pipeline in layout.pipelines:
        spans = ((starts.index(s.start), stops.index(s.stop), " ".join(s.members)) for s in pipeline.stages)
        cells.append(list(spans))
    widths = [len(column) for column in columns]
    for first, last, label in (cell for row in cells for cell in row):
        missing = len(label) - (sum(widths[first : last + 1]) + 3 * (last - first))
        widths[last] += max(missing, 0)
    names = ["layers", *(f"pipeline {i}" for i in range(len(cells)))]
    shares = ["", *(f"micro-batches {p.micro_start}:{p.micro_stop}" for p in layout.pipelines)]
    rows = [[(i, i, column) for i, column in enumerate(columns)], *cells]
    margin = max(map(len, names))
    return [
        f"{name:<{margin}} | " + "".join(_cell(cell, widths) for cell in row) + share
        for name, row, share in zip(names, rows, shares, strict=True)
    ]


def _cell(cell: tuple[int, int, str], widths: list[int]) -> str:
    first, last, label = cell
    return label.ljust(sum(widths[first : last + 1]) + 3 * (last - first)) + " | "


def parameters(checkpoint: Checkpoint) -> int:
    """How many numbers the model has."""
    return sum(prod(t.shape) for t in checkpoint.manifest.tensors if t.tensor.startswith("param/"))


def tensor_bytes(tensor: TensorRecord) -> int:
    """Of the whole tensor."""
    return prod(tensor.shape) * ITEM_BYTES[tensor.dtype]


def config_of(checkpoint: Checkpoint) -> dict[str, Any]:
    """The configuration that the checkpoint was made with, secrets hidden, as final/config.json has it.

    Raises:
        ConfigError: if it is no configuration.
    """
    try:
        layer = read_layer(checkpoint.manifest.content.config, f"{checkpoint.url}: config")
    except ConfigError as error:
        raise ConfigError(f"{error.problem}; take another step (--step)", error.key, error.source) from None
    values: Any = OmegaConf.to_container(layer.values, resolve=False)
    return {str(key): value for key, value in values.items() if key != FINGERPRINT}


def _tensor_lines(tensors: tuple[TensorRecord, ...]) -> list[str]:
    """One line for a parameter and its moments, as far as they are alike; how many slices each has."""
    alike: dict[tuple[str, str, tuple[int, ...]], dict[str, int]] = {}
    for tensor in tensors:
        kind, _, name = tensor.tensor.partition("/")
        alike.setdefault((name, tensor.dtype, tensor.shape), {})[kind] = len(tensor.slices)
    rows = []
    for (name, dtype, shape), slices in sorted(alike.items(), key=lambda of: _natural(of[0][0])):
        kinds = sorted(slices, key=lambda kind: (kind != "param", kind))
        text = ", ".join(f"{kind} {slices[kind]}" for kind in kinds)
        rows.append((name, " x ".join(map(str, shape)) or "scalar", dtype, text))
    return aligned(("parameter", "shape", "dtype", "slices"), rows)


def _natural(name: str) -> list[tuple[int, str]]:
    """Sorts "blocks.2" before "blocks.10"."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"([0-9]+)", name)]


def _section(title: str, lines: list[str]) -> list[str]:
    return ["", title, *(f"  {line}" for line in lines)] if lines else []
