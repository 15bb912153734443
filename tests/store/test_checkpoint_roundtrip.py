"""What is written is read: by any box, by foreign tools, by several threads."""

import json
import random
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from checkpoint_state import (
    CHUNK,
    CONTENT,
    as_bytes,
    checkpoints,
    commit,
    load,
    make_state,
    pieces_of,
    random_box,
    same,
    save,
)
from safetensors.numpy import load_file

from evenkeel.core.boxes import Box, full
from evenkeel.core.codec import dump
from evenkeel.core.codec import load as decode
from evenkeel.core.ids import NodeId, Version, WorkerId
from evenkeel.plan.reshard import reshard
from evenkeel.plan.state import Slice
from evenkeel.store.checkpoint_part import Part, Piece
from evenkeel.store.checkpoint_reader import Want
from evenkeel.store.checkpoints import Checkpoints
from evenkeel.store.files import Files, LocalFiles
from evenkeel.store.manifest import CHUNK_BYTES

WEIGHTS = ("param/weight", "exp_avg/weight", "exp_avg_sq/weight")


@pytest.mark.stores("moto", "rgw")
def test_what_is_written_is_read(files: Files) -> None:
    state = make_state(0)
    save(files, state, 10, generation=3)
    found = checkpoints(files).open(10)
    assert found is not None
    assert same(load(found), state)
    assert found.manifest.content == CONTENT
    assert found.manifest.version == Version(10, 3)
    assert list(found.damage(thorough=True)) == []


def test_any_boxes_of_any_cut_are_read_against_numpy(files: Files) -> None:
    for seed in range(60):
        rng = random.Random(seed)
        state = make_state(seed)
        found = save(files, state, seed + 1)
        wants: list[Want] = []
        for name in rng.choices(sorted(state), k=8):
            box = random_box(state[name].shape, rng)
            wants.append(Want(name, box, as_bytes(np.zeros(box.shape, state[name].dtype))))
        found.read(wants)
        for want in wants:
            assert bytes(want.buffer) == state[want.tensor][want.box.slices].tobytes(), (seed, want.tensor, want.box)


def test_a_checkpoint_is_a_holder_like_any_other(files: Files) -> None:
    """plan/reshard.py says what to read; that is all that loading on another layout takes."""
    state = make_state(1)
    found = save(files, state, 1)
    disk, reader, node = WorkerId("checkpoint"), WorkerId("w0009"), NodeId("n")
    wanted = [Slice("exp_avg/weight", Box((0, 2), (7, 4))), Slice("param/scale", Box((), ()))]
    answer = reshard({reader: wanted}, {disk: tuple(found.manifest.slices())}, {disk: node, reader: node})
    assert not answer.missing
    for move in answer.transfers:
        got = np.empty(move.box.shape, state[move.tensor].dtype)
        found.read([Want(move.tensor, move.box, as_bytes(got))])
        assert got.tobytes() == state[move.tensor][move.box.slices].tobytes()


def test_the_safetensors_library_opens_each_file(tmp_path: Path) -> None:
    state = make_state(2)
    found = save(LocalFiles(tmp_path), state, 3)
    back = {name: np.full_like(value, -1) for name, value in state.items()}
    for file in found.manifest.files:
        tensors = load_file(tmp_path / found.folder / file.name)
        for key, value in tensors.items():
            name, _, ranges = key[:-1].rpartition("[")
            box = [tuple(map(int, r.split(":"))) for r in ranges.split(",")] if ranges else []
            back[name][tuple(slice(a, b) for a, b in box)] = value
    assert same(back, state)


def test_each_tensor_is_aligned_in_its_file(tmp_path: Path) -> None:
    """Libraries that map a file need that."""
    found = save(LocalFiles(tmp_path), make_state(3), 3)
    width = {"F64": 8, "F32": 4, "F16": 2}
    assert all(piece.start % width[t.dtype] == 0 for t in found.manifest.tensors for piece in t.slices)


def test_parts_and_manifest_go_through_json(files: Files) -> None:
    store, state = checkpoints(files), make_state(4)
    at = Version(5, 1)
    parts = [store.write(at, f"w{i}", p) for i, p in enumerate(pieces_of(state, 3, random.Random(1)))]
    again = [decode(json.loads(json.dumps(dump(part, Part))), Part) for part in parts]
    assert again == parts
    assert same(load(commit(files, at, state, again)), state)


def test_a_worker_with_nothing_to_write_writes_an_empty_part(files: Files) -> None:
    store, state = checkpoints(files), make_state(5)
    at = Version(5, 1)
    parts = [store.write(at, "w1", pieces_of(state, 1, random.Random(1))[0]), store.write(at, "w2", [])]
    assert same(load(commit(files, at, state, parts)), state)


@pytest.mark.parametrize(
    ("box", "items", "dtype", "match"),
    [
        (Box((0, 0), (8, 6)), 48, "F32", "not within"),
        (Box((0, 0), (7, 6)), 41, "", r"a buffer of 164 bytes"),
        (Box((0, 0), (7, 6)), 42, "I32", r"step-00000001: exp_avg/weight is of F32, not of I32"),
    ],
)
def test_wants_that_make_no_sense(files: Files, box: Box, items: int, dtype: str, match: str) -> None:
    found = save(files, make_state(0), 1)
    with pytest.raises(ValueError, match=match):
        found.read([Want("exp_avg/weight", box, memoryview(bytearray(4 * items)), dtype)])


def test_a_tensor_that_is_not_there(files: Files) -> None:
    found = save(files, make_state(0), 1)
    with pytest.raises(ValueError, match=r"step-00000001: has no tensor 'param/other'"):
        found.read([Want("param/other", Box((), ()), memoryview(bytearray(4)))])


def test_a_box_of_a_larger_tensor_is_not_taken_for_a_smaller_tensor(files: Files) -> None:
    found = save(files, make_state(0), 1)
    box, buffer = full((7, 5)), memoryview(bytearray(4 * 35))
    found.read([Want("exp_avg/weight", box, buffer, "F32", (7, 6))])
    with pytest.raises(ValueError, match=r"step-00000001: exp_avg/weight has shape \[7, 6\], not \[7, 5\]"):
        found.read([Want("exp_avg/weight", box, buffer, "F32", (7, 5))])


def test_a_piece_without_its_bytes_is_refused(files: Files) -> None:
    store = checkpoints(files)
    piece = Piece("param/x", "F32", (4,), full((4,)), memoryview(bytearray(12)))
    with pytest.raises(ValueError, match=r"12 bytes, 16 expected"):
        store.write(Version(1, 1), "w1", [piece])
    assert files.names("checkpoints/step-00000001") == []


def test_neither_writing_nor_reading_copies_the_state(tmp_path: Path) -> None:
    """Beside the state itself, a reader holds one chunk, and a writer not even that."""
    value = np.arange(6 << 20, dtype="float32").reshape(-1, 1024)
    whole = full(value.shape)
    store, at = Checkpoints(LocalFiles(tmp_path)), Version(1, 1)
    with peak() as writing:
        part = store.write(at, "w1", [Piece("param/x", "F32", value.shape, whole, memoryview(value))])
    found = store.commit(at, CONTENT, [part], {"param/x": value.shape}, epoch=1)
    back = np.empty_like(value)
    columns = np.empty((value.shape[0], 100), value.dtype)
    with peak() as reading:
        found.read([Want("param/x", whole, as_bytes(back))])
        found.read([Want("param/x", Box((0, 50), (value.shape[0], 150)), as_bytes(columns))])
    assert (back == value).all() and (columns == value[:, 50:150]).all()
    assert writing[0] < 1 << 20
    assert reading[0] < CHUNK_BYTES + (1 << 20)


@contextmanager
def peak() -> Iterator[list[int]]:
    """Fills in how many bytes more than at its beginning were allocated in the block at once."""
    found: list[int] = []
    tracemalloc.start()
    try:
        yield found
        found.append(tracemalloc.get_traced_memory()[1])
    finally:
        tracemalloc.stop()


class Counted(LocalFiles):
    """Notes where each byte range begins that is read."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.starts: list[tuple[str, int]] = []

    def read_into(self, name: str, offset: int, buffer: memoryview) -> int | None:
        self.starts.append((name, offset))
        return super().read_into(name, offset, buffer)


def test_each_chunk_is_read_once_and_only_what_is_needed(tmp_path: Path) -> None:
    """Also if wants lie across each other in a file, as the halves of a matrix that is cut by columns."""
    files, state = Counted(tmp_path), make_state(6)
    found = save(files, state, 1)
    halves = [Box((0, 0), (7, 3)), Box((0, 3), (7, 6))]
    wants = [Want(name, box, memoryview(bytearray(21 * state[name].itemsize))) for box in halves for name in WEIGHTS]
    found.read(wants)
    slices = [piece for name in WEIGHTS for piece in found.manifest.tensor(name).slices]
    needed = {(f"{found.folder}/{p.file}", at // CHUNK * CHUNK) for p in slices for at in range(p.start, p.stop)}
    assert sorted(files.starts) == sorted(needed)
