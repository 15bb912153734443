"""Writes one checkpoint as ours are written, or the same bytes plainly, with nothing else to do.

Arguments: work.yaml, URL of an empty folder, output, and "ours" or "plain". What is written is removed again. On a
local path the plain one is one file, written from its first byte to its last with the same checksum and synced; on an
object store one upload by the file system's client, with the settings that ours has.
"""

import json
import os
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from bench.plain import write_plainly
from evenkeel.config import load_config
from evenkeel.core.ids import NodeId, Version, WorkerId
from evenkeel.core.layout import Layout
from evenkeel.core.model import ModelShape
from evenkeel.plan.copies import place_copies
from evenkeel.plan.layout import Infeasible
from evenkeel.plan.state import KINDS
from evenkeel.plan.writers import written_by
from evenkeel.runtime.prepare import first_layout, prepare
from evenkeel.runtime.saving import shapes
from evenkeel.store.checkpoint_part import Piece
from evenkeel.store.checkpoints import Checkpoints, folder
from evenkeel.store.files import LocalFiles, ObjectFiles, open_files
from evenkeel.store.manifest import Content

VERSION = Version(10, 1)


@dataclass(frozen=True)
class State:
    """What is to be written: all parts, one behind the other in `data`, as the workers' copies would be."""

    model: ModelShape
    layout: Layout
    parts: dict[WorkerId, list[Piece]]
    data: memoryview


def made_up(model: ModelShape, layout: Layout) -> State:
    """Random numbers, for a disk may know how to write zeros quickly."""
    copies = place_copies(layout, model, 1, dict.fromkeys(layout.members, NodeId("local")))
    spans = {worker: written_by(worker, copies, layout, model) for worker in layout.members}
    size = len(KINDS) * sum(span.stop - span.start for found in spans.values() for span in found)
    data = np.random.default_rng(0).standard_normal(size, dtype=np.float32)
    parts: dict[WorkerId, list[Piece]] = {worker: [] for worker in layout.members}
    at = 0
    for worker in layout.members:
        for kind in KINDS:
            for span in spans[worker]:
                for piece in span.pieces:
                    start = at + piece.start - span.start
                    view = memoryview(data[start : start + piece.box.size].data)
                    parts[worker].append(Piece(f"{kind}/{piece.param.name}", "F32", piece.param.shape, piece.box, view))
                at += span.stop - span.start
    return State(model, layout, parts, memoryview(data.data).cast("B"))


def ours(state: State, files: LocalFiles | ObjectFiles) -> None:
    """Every part, one after the other, and the manifest. In a run the workers write at the same time: that would hide
    what the writing costs."""
    checkpoints = Checkpoints(files)
    parts = [checkpoints.write(VERSION, worker, pieces) for worker, pieces in state.parts.items()]
    content = Content(seed=0, samples=0, config="", layout=state.layout)
    checkpoints.commit(VERSION, content, parts, shapes(state.model), epoch=1)


def plain(state: State, files: LocalFiles | ObjectFiles) -> Callable[[], object]:
    """What writes the same bytes; made beforehand, so that only the writing is measured."""
    if isinstance(files, LocalFiles):
        return lambda: write_plainly(files.path("plain"), [state.data])
    data, name = bytes(state.data), f"{files.where().removeprefix('s3://')}/plain"
    return lambda: files.fs.pipe_file(name, data)


def timed(write: Callable[[], object]) -> dict[str, float]:
    os.sync()  # so that nobody pays for what others have written
    cpu, began = time.process_time(), time.perf_counter()
    write()
    return {"s": time.perf_counter() - began, "cpu_s": time.process_time() - cpu}


def remove(files: LocalFiles | ObjectFiles) -> None:
    if isinstance(files, LocalFiles):
        shutil.rmtree(files.root / "checkpoints", ignore_errors=True)
        files.path("plain").unlink(missing_ok=True)
    else:
        files.remove_folder(folder(VERSION.step))
        files.remove("plain")


def main() -> None:
    work, url, output, how = sys.argv[1:]
    prepared = prepare(load_config([work]))
    planned = first_layout(prepared)
    assert not isinstance(planned, Infeasible), planned.reason
    files = open_files(url)
    assert isinstance(files, LocalFiles | ObjectFiles)
    state = made_up(prepared.spec.policy.model, planned.layout)
    files.replace("warm-up", b"connected")
    write = plain(state, files) if how == "plain" else lambda: ours(state, files)
    found = timed(write)
    remove(files)
    Path(output).write_text(json.dumps({"bytes": state.data.nbytes, **found}))


if __name__ == "__main__":
    main()
