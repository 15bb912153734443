"""A small state as numpy arrays, cut into the pieces that some workers write; what the checkpoint tests share."""

import random
from collections.abc import Sequence

import numpy as np
from xxhash import xxh3_64_hexdigest

from evenkeel.core.boxes import Box, full
from evenkeel.core.ids import Version, WorkerId
from evenkeel.core.layout import Layout, Pipeline, Stage
from evenkeel.store.checkpoint_part import Part, Piece
from evenkeel.store.checkpoint_reader import Checkpoint, Want
from evenkeel.store.checkpoints import Checkpoints
from evenkeel.store.files import Files
from evenkeel.store.manifest import Content

State = dict[str, np.ndarray]
DTYPES = {"float64": "F64", "float32": "F32", "float16": "F16"}
CHUNK = 64
CONTENT = Content(
    seed=7,
    samples=320,
    config="run:\n  name: test\n",
    layout=Layout((Pipeline((Stage(0, 2, (WorkerId("w0001"),)),), 0, 4),)),
)


def make_state(seed: int) -> State:
    """Scalars, an empty tensor, odd sizes and three dtypes."""
    values = np.random.default_rng(seed)
    shapes: dict[str, tuple[int, ...]] = {
        "scale": (),
        "none": (0, 3),
        "bias": (5,),
        "weight": (7, 6),
        "conv": (3, 2, 5),
    }
    state: State = {}
    for name, shape in shapes.items():
        for kind, dtype in (("param", "float16"), ("exp_avg", "float32"), ("exp_avg_sq", "float64")):
            state[f"{kind}/{name}"] = values.standard_normal(shape).astype(dtype)
    return state


def shapes(state: State) -> dict[str, tuple[int, ...]]:
    return {name: value.shape for name, value in state.items()}


def random_cut(box: Box, rng: random.Random, times: int) -> list[Box]:
    """Boxes that tile `box`, by up to so many cuts at random places."""
    sides = [d for d, n in enumerate(box.shape) if n > 1]
    if not times or not sides:
        return [box]
    d = rng.choice(sides)
    at = rng.randrange(box.start[d] + 1, box.stop[d])
    left = Box(box.start, (*box.stop[:d], at, *box.stop[d + 1 :]))
    right = Box((*box.start[:d], at, *box.start[d + 1 :]), box.stop)
    return [part for half in (left, right) for part in random_cut(half, rng, times - 1)]


def random_box(shape: Sequence[int], rng: random.Random) -> Box:
    starts = tuple(rng.randint(0, n) for n in shape)
    return Box(starts, tuple(rng.randint(a, n) for a, n in zip(starts, shape, strict=True)))


def pieces_of(state: State, workers: int, rng: random.Random) -> list[list[Piece]]:
    """Each box of a random cut goes to some worker."""
    found: list[list[Piece]] = [[] for _ in range(workers)]
    for name, value in state.items():
        for box in random_cut(full(value.shape), rng, 2):
            data = np.ascontiguousarray(value[box.slices])
            piece = Piece(name, DTYPES[value.dtype.name], value.shape, box, memoryview(data))
            found[rng.randrange(workers)].append(piece)
    return found


def checkpoints(files: Files) -> Checkpoints:
    return Checkpoints(files, chunk_bytes=CHUNK)


def write_parts(files: Files, version: Version, state: State, workers: int = 2) -> list[Part]:
    pieces = pieces_of(state, workers, random.Random(version.step))
    return [checkpoints(files).write(version, f"w{i:04d}", pieces[i]) for i in range(workers)]


def commit(files: Files, version: Version, state: State, parts: list[Part], epoch: int = 1) -> Checkpoint:
    return checkpoints(files).commit(version, CONTENT, parts, shapes(state), epoch=epoch)


def save(files: Files, state: State, step: int, generation: int = 1) -> Checkpoint:
    version = Version(step, generation)
    return commit(files, version, state, write_parts(files, version, state))


def load(checkpoint: Checkpoint) -> State:
    """Every tensor whole."""
    names = {"F64": "float64", "F32": "float32", "F16": "float16"}
    state = {t.tensor: np.empty(t.shape, names[t.dtype]) for t in checkpoint.manifest.tensors}
    checkpoint.read([Want(name, full(value.shape), as_bytes(value)) for name, value in state.items()])
    return state


def as_bytes(value: np.ndarray) -> memoryview:
    """Of a contiguous array; the same memory."""
    return memoryview(value.reshape(-1).view(np.uint8))


def same(a: State, b: State) -> bool:
    """Bitwise."""
    return a.keys() == b.keys() and all(
        a[n].dtype == b[n].dtype and a[n].shape == b[n].shape and a[n].tobytes() == b[n].tobytes() for n in a
    )


def unsealed(manifest: bytes) -> bytes:
    """A manifest without the digest at its end."""
    return manifest[: manifest.rindex(b',"digest":')]


def sealed(text: bytes) -> bytes:
    """With the digest that goes with it: a lie rather than damage."""
    return text + b',"digest":"%s"}' % xxh3_64_hexdigest(text).encode()
