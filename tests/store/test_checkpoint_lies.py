"""Manifests and safetensors headers that lie: an error that names the file, little memory, nothing read elsewhere."""

import json
import os
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from checkpoint_state import CHUNK, CONTENT, checkpoints, load, make_state, same, save, sealed, unsealed
from hypothesis import given, settings
from hypothesis import strategies as st
from lies import places
from xxhash import xxh3_64_hexdigest

from evenkeel.config_values import ConfigError
from evenkeel.core.boxes import full
from evenkeel.core.ids import Version
from evenkeel.store.checkpoint_reader import Checkpoint, Want
from evenkeel.store.errors import StoreError
from evenkeel.store.files import LocalFiles
from evenkeel.store.final import ITEM_BYTES, header
from evenkeel.store.manifest import (
    CHECKSUM,
    FORMAT,
    MAX_CHUNK_BYTES,
    MAX_MANIFEST_BYTES,
    CheckpointDamaged,
    FileRecord,
    Manifest,
    SliceRecord,
    TensorRecord,
    spec,
    to_json,
)
from evenkeel.tools import describe

STATE = {name: value for name, value in make_state(0).items() if name.endswith(("bias", "scale", "conv"))}
FOLDER = "checkpoints/step-00000001"
MIB = 1 << 20


class Watched(LocalFiles):
    """Notes what is read."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.seen: set[str] = set()

    def read(self, name: str, offset: int = 0) -> bytes | None:
        self.seen.add(name)
        return super().read(name, offset)

    def read_into(self, name: str, offset: int, buffer: memoryview) -> int | None:
        self.seen.add(name)
        return super().read_into(name, offset, buffer)


class Victim:
    """A run directory with one checkpoint, whose manifest is replaced by lies."""

    def __init__(self, root: Path) -> None:
        self.files = Watched(root)
        self.checkpoint = save(self.files, STATE, 1)
        self.manifest = self.path("manifest.json").read_bytes()
        self.values = json.loads(unsealed(self.manifest) + b"}")

    def path(self, name: str) -> Path:
        return self.files.path(f"{FOLDER}/{name}")

    def told(self, manifest: bytes, limit: int = 4 * MIB) -> list[str]:
        """What all uses of a checkpoint with this manifest say that is wrong; "" where one has nothing to say."""
        self.path("manifest.json").write_bytes(manifest)
        self.files.seen.clear()
        with bounded(limit):
            errors = [error for use in (open_it, list_it, read_it, verify_it, show_it) for error in use(self.files)]
        for name in self.files.seen:
            assert name == f"{FOLDER}/{Path(name).name}", "read outside of its folder"
        for error in filter(None, errors):
            assert error.startswith(self.files.where(FOLDER))
            assert error.isprintable() and len(error) < 1000
        return errors


@contextmanager
def bounded(limit: int) -> Iterator[None]:
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < limit
    finally:
        tracemalloc.stop()


def open_it(files: LocalFiles) -> Iterator[str]:
    try:
        checkpoints(files).open(1)
    except StoreError as error:
        yield str(error)


def list_it(files: LocalFiles) -> Iterator[str]:
    try:
        _, damaged = checkpoints(files).newest_first()
    except StoreError as error:
        yield str(error)
    else:
        yield from map(str, damaged.values())


def read_it(files: LocalFiles) -> Iterator[str]:
    """The first corner of each tensor that it claims to have."""
    try:
        found = checkpoints(files).open(1)
        assert found is not None
        for tensor in found.manifest.tensors:
            box = full(tuple(min(side, 8 if len(tensor.shape) < 4 else 1) for side in tensor.shape))
            found.read([Want(tensor.tensor, box, memoryview(bytearray(box.size * ITEM_BYTES[tensor.dtype])))])
    except StoreError as error:
        yield str(error)


def verify_it(files: LocalFiles) -> Iterator[str]:
    try:
        found = checkpoints(files).open(1)
        assert found is not None
        yield from map(str, found.damage(thorough=True))
    except StoreError as error:
        yield str(error)


def show_it(files: LocalFiles) -> Iterator[str]:
    try:
        found = checkpoints(files).open(1)
        assert found is not None
        json.dumps(describe.record(found, ""))
        describe.description(found, "")
    except (StoreError, ConfigError) as error:
        yield str(error)


@pytest.fixture(scope="module")
def victim(tmp_path_factory: pytest.TempPathFactory) -> Victim:
    root = tmp_path_factory.mktemp("victim")
    outside = root / "g1-outside.safetensors"
    found = Victim(root)
    outside.write_bytes(found.path("g1-w0000.safetensors").read_bytes())
    assert found.told(found.manifest) == []
    return found


def encoded(values: Any) -> bytes:
    return sealed(json.dumps(values, separators=(",", ":")).encode()[:-1])


# ---------------------------------------------------------------- any lie

STRANGE: list[Any] = [
    None, True, 0, 1, -1, 7, 64, 2**31, 2**62, 2**62 + 1, -(2**70), 10**300, 1.0, 1.5, float("nan"), float("inf"),
    "", "x", "F64", "F16", "BF16", "F8", "0" * 16, "../g1-outside.safetensors", "/etc/passwd", "manifest.json", "..",
    "g1-../../g1-outside.safetensors", "../../g1-outside.safetensors", "g1-w0000.safetensors\n", "g1-w0000.safetensors",
    "g2-w0000.safetensors", "param/", "param/x", "param/x\n", "param/\ud800", "\ud800", "\x00", "x" * 3000,
    10**400, 10**4299, [10**4299] * 3, "run: !!int x", "run: [[[", "a: " + "[" * 5000, "x: !!binary eA==", "- 5", "5",
    "x: ${", "x: &x [*x]", "x: " + "9" * 5000,
    [], {}, [[]], [0], [-1], [2**62], [2**40] * 3, [1] * 70, [[[[[[[[]]]]]]]], {"start": [], "stop": []},
    {"start": [0], "stop": [2**62]}, {"start": [5], "stop": [2]}, {"start": [0], "stop": [0, 0]}, {"format": 1},
]  # fmt: skip


def tell(values: Any, data: st.DataObject) -> None:
    """Changes, removes, doubles or swaps something somewhere."""
    everywhere = list(places(values))
    container, key = data.draw(st.sampled_from(everywhere))
    how = data.draw(st.sampled_from(["strange", "near", "remove", "double", "copy", "add"]))
    if how == "strange":
        container[key] = deepcopy(data.draw(st.sampled_from(STRANGE)))
    elif how == "near" and type(container[key]) is int:
        container[key] += data.draw(st.sampled_from([-64, -8, -1, 1, 8, 64]))
    elif how == "remove":
        del container[key]
    elif how == "double" and isinstance(container, list):
        container.insert(key, deepcopy(container[key]))
    elif how == "copy":
        other, name = data.draw(st.sampled_from(everywhere))
        container[key] = deepcopy(other[name])
    elif how == "add" and isinstance(container, dict):
        container["more"] = 1


@settings(deadline=None, max_examples=100)
@given(data=st.data())
def test_a_lie_anywhere_in_the_manifest(victim: Victim, data: st.DataObject) -> None:
    values = deepcopy(victim.values)
    for _ in range(data.draw(st.integers(1, 3))):
        if values:
            tell(values, data)
    victim.told(encoded(values))


@settings(deadline=None, max_examples=100)
@given(
    data=st.data(),
    cuts=st.lists(st.tuples(st.floats(0, 1), st.integers(0, 20)), max_size=3),
    words=st.sampled_from([b"NaN", b"-Infinity", b"1e999", b"\xff\xfe", b"\xed\xa0\x80", b"\\ud800", b'"', b"]", b"}"]),
)
def test_bytes_that_are_no_manifest(
    victim: Victim, data: st.DataObject, cuts: list[tuple[float, int]], words: bytes
) -> None:
    text = unsealed(victim.manifest)
    for at, length in cuts:
        first = int(at * len(text))
        new = data.draw(st.sampled_from([words, b""]) | st.binary(max_size=8))
        text = text[:first] + new + text[first + length :]
    victim.told(sealed(text))


# ---------------------------------------------------------------- lies told well

RAW: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "a key twice": (lambda m: m.replace(b'"epoch":1', b'"epoch":1,"epoch":1'), "key 'epoch' is there twice"),
    "NaN": (lambda m: m.replace(b'"epoch":1', b'"epoch":NaN'), "NaN is not a number"),
    "Infinity": (lambda m: m.replace(b'"epoch":1', b'"epoch":-Infinity'), "-Infinity is not a number"),
    "a fraction": (lambda m: m.replace(b'"epoch":1', b'"epoch":1.0'), "epoch: int expected, not 1.0"),
    "a bool": (lambda m: m.replace(b'"epoch":1', b'"epoch":true'), "epoch: int expected, not True"),
    "a huge number": (lambda m: m.replace(b'"epoch":1', b'"epoch":1' + b"0" * 5000), "not valid JSON: Exceeds"),
    "invalid UTF-8": (lambda m: m.replace(b"name: test", b"name: \xff\xff"), "not valid JSON: 'utf-8' codec"),
    "half a surrogate pair": (lambda m: m.replace(b"name: test", b"name: \\ud800"), "surrogates not allowed"),
    "a list for a number": (
        lambda m: m.replace(b'"epoch":1', b'"epoch":' + b"[" * 900 + b"]" * 900), "nested too deeply"
    ),
    "a long text for a number": (
        lambda m: m.replace(b'"epoch":1', b'"epoch":"' + b"x" * 100_000 + b'"'), "epoch: int expected, not 'xxxx"
    ),
    "deep nesting": (lambda m: m.replace(b'"epoch":1', b'"epoch":' + b"[" * 200_000), "nested too deeply"),
    "no object": (lambda m: b"[1", "not valid JSON"),
    "no format": (lambda m: m.replace(b'"format":1,', b""), "has no format version"),
    "a format that is no number": (lambda m: m.replace(b'"format":1,', b'"format":true,'), "has no format version"),
    "a format before the first": (lambda m: m.replace(b'"format":1,', b'"format":0,'), "format 0 is not 1"),
    "another checksum": (lambda m: m.replace(b'"xxh3_64"', b'"crc32"'), "checksum 'crc32' is not xxh3_64"),
}


@pytest.mark.parametrize("lie", RAW)
def test_json_that_lies(victim: Victim, lie: str) -> None:
    change, says = RAW[lie]
    text = unsealed(victim.manifest)
    assert change(text) != text
    errors = victim.told(sealed(change(text)))
    assert len(errors) == 5
    assert all(error.startswith(victim.files.where(f"{FOLDER}/manifest.json: ")) and says in error for error in errors)


def tensors(change: Callable[[Any], None]) -> Callable[[Any], None]:
    """On each tensor of the manifest."""

    def lie(values: Any) -> None:
        for tensor in values["tensors"]:
            change(tensor)

    return lie


TOLD: dict[str, tuple[Callable[[Any], None], str]] = {
    "a path upwards": (lambda v: v["files"][0].update(name="../g1-outside.safetensors"), "is not that of a part"),
    "an absolute path": (lambda v: v["files"][0].update(name="/etc/passwd"), "is not that of a part"),
    "another folder": (lambda v: v["files"][0].update(name="g1-a/b.safetensors"), "is not that of a part"),
    "a line end in a name": (lambda v: v["files"][0].update(name="g1-w0000.safetensors\n"), "is not that of a part"),
    "another generation": (lambda v: v["files"][0].update(name="g2-w0000.safetensors"), "is not of generation 1"),
    "one file twice": (lambda v: v["files"].append(v["files"][0]), "two files have one name"),
    "one tensor twice": (lambda v: v["tensors"].append(v["tensors"][0]), "two tensors have one name"),
    "no files": (lambda v: v["files"].clear(), "is not among the files"),
    "a file more": (
        lambda v: v["files"].append({"name": "g1-w.safetensors", "size": 9, "chunk_bytes": 9, "checksums": ["0" * 16]}),
        "g1-w.safetensors: has 9 bytes, its slices end at",
    ),
    "a huge file": (lambda v: v["files"][0].update(size=2**62), "checksums, 72057594037927936 expected"),
    "a file past all": (lambda v: v["files"][0].update(size=2**63), "size 9223372036854775808 is not 0 to"),
    "huge chunks": (lambda v: v["files"][0].update(chunk_bytes=2**40), "is not 1 to 67108864"),
    "no chunks": (lambda v: v["files"][0].update(chunk_bytes=0), "is not 1 to 67108864"),
    "a checksum that is none": (lambda v: v["files"][0]["checksums"].__setitem__(0, "x" * 16), "is not 16 hexadecimal"),
    "no kind": (lambda v: v["tensors"][0].update(tensor="bias"), "is not KIND/PARAMETER"),
    "half a surrogate pair": (lambda v: v["tensors"][0].update(tensor="param/\ud800"), r"'param/\ud800' is not KIND"),
    "another dtype": (tensors(lambda t: t.update(dtype="I8")), "dtype 'I8' is not one of F64, F32, BF16, F16"),
    "a dtype as wide": (tensors(lambda t: t.update(dtype="BF16")), "are not those of its box at"),
    "a side below 0": (tensors(lambda t: t.update(shape=[-1])), "a side -1 is not 0 to"),
    "many dimensions": (tensors(lambda t: t.update(shape=[1] * 65)), "shape is too large"),
    "a huge shape": (tensors(lambda t: t.update(shape=[2**40, 2**40])), "shape is too large"),
    "a shape not covered": (tensors(lambda t: t.update(shape=[*t["shape"][:-1], 2**30])), "is in none of its slices"),
    "no slices": (tensors(lambda t: t.update(slices=[])), "is in none of its slices"),
    "slices twice": (tensors(lambda t: t.update(slices=t["slices"] * 2)), "is in 2 of its slices"),
    "a box outside": (
        tensors(lambda t: t["slices"][0]["box"].update(stop=[2**61] * len(t["shape"]))),
        "is not within the tensor's shape",
    ),
    "a box inside out": (tensors(lambda t: t["slices"][0].update(box={"start": [5], "stop": [2]})), "not a box"),
    "an offset past the end": (tensors(lambda t: t["slices"][0].update(start=2**62)), "are not those of its box"),
    "an offset before the start": (tensors(lambda t: t["slices"][0].update(start=-8)), "are not those of its box"),
    "a slice too long": (tensors(lambda t: t["slices"][0].update(stop=2**62)), "are not those of its box"),
    "a file that is not named": (
        tensors(lambda t: t["slices"][0].update(file="../g1-outside.safetensors")),
        "'../g1-outside.safetensors' is not among the files",
    ),
    "a worker that is a path": (
        lambda v: v["content"]["layout"]["pipelines"][0]["stages"][0].update(members=["../w"]),
        "layout: '../w' is not the name of a worker",
    ),
    "no stages": (lambda v: v["content"]["layout"]["pipelines"][0].update(stages=[]), "a stage is missing"),
    "layers out of order": (
        lambda v: v["content"]["layout"]["pipelines"][0]["stages"][0].update(start=1),
        "pipeline 0 stage 0 has layers 1 to 2",
    ),
    "a seed below 0": (lambda v: v["content"].update(seed=-1), "seed -1 is not 0 to 18446744073709551615"),
    "a huge depth": (
        lambda v: v["content"]["layout"]["pipelines"][0]["stages"][0].update(stop=2**70),
        "layout: depth 1180591620717411303424 is not 0 to",
    ),
    "huge shares": (
        lambda v: v["content"]["layout"]["pipelines"][0].update(micro_stop=10**4000),
        "layout: micro-batches 1000000",
    ),
    "no position in the data": (lambda v: v["content"].update(samples=-1), "samples -1 is not 0 to"),
    "an epoch before the first": (lambda v: v.update(epoch=-1), "epoch -1 is not 0 to"),
    "a step before the first": (lambda v: v["version"].update(step=-1), "step -1 is not 0 to"),
    "a field that is not there": (lambda v: v["version"].pop("step"), "field 'step' of Version is missing"),
    "a field too many": (lambda v: v["version"].update(more=1), "Version has no field 'more'"),
}


@pytest.mark.parametrize("lie", TOLD)
def test_a_manifest_that_lies(victim: Victim, lie: str) -> None:
    change, says = TOLD[lie]
    values = deepcopy(victim.values)
    change(values)
    errors = victim.told(encoded(values))
    assert len(errors) == 5
    assert all(error.startswith(victim.files.where(f"{FOLDER}/manifest.json: ")) and says in error for error in errors)


# ---------------------------------------------------------------- huge ones


def claim(elements: int) -> Manifest:
    """A manifest without a contradiction: one tensor, in one file."""
    box = full((elements,))
    start = len(header([spec("param/x", "F32", box)]))
    stop = start + 4 * elements
    checksums = ("0" * 16,) * -(-stop // MAX_CHUNK_BYTES)
    file = FileRecord("g1-w0000.safetensors", stop, MAX_CHUNK_BYTES, checksums)
    tensor = TensorRecord("param/x", "F32", box.shape, (SliceRecord(file.name, start, stop, box),))
    return Manifest(FORMAT, Version(1, 1), 1, CONTENT, CHECKSUM, (file,), (tensor,))


def test_a_huge_claim_without_contradiction_costs_a_chunk_of_memory(victim: Victim) -> None:
    manifest = claim(5 * 10**9)
    written = manifest.files[0].size
    errors = victim.told(to_json(manifest), limit=MAX_CHUNK_BYTES + 4 * MIB)
    size = victim.path("g1-w0000.safetensors").stat().st_size
    assert errors[0].endswith(f"g1-w0000.safetensors: has {size} bytes, {written} were written")
    assert errors[1].endswith(f"g1-w0000.safetensors: ends at byte {size}, {written} were written")


def test_boxes_that_are_too_many_to_check(victim: Victim) -> None:
    values = deepcopy(victim.values)
    tensor = values["tensors"][0]
    tensor["shape"] = [2] * 40
    tensor["slices"] = [{**tensor["slices"][0], "box": {"start": [0] * 40, "stop": [1] * 40}}] * 2
    errors = victim.told(encoded(values))
    assert "2 boxes cut in 40 dimensions are more than can be checked" in errors[0]


def test_a_manifest_that_is_too_large_is_not_read(victim: Victim) -> None:
    victim.path("manifest.json").write_bytes(b"")
    os.truncate(victim.path("manifest.json"), MAX_MANIFEST_BYTES + 1)
    with bounded(MIB), pytest.raises(CheckpointDamaged) as caught:
        checkpoints(victim.files).open(1)
    assert str(caught.value).endswith("manifest.json: has 67108865 bytes, at most 67108864 are read")


# ---------------------------------------------------------------- headers


def with_header(victim: Victim, head: bytes) -> Checkpoint:
    """The checkpoint with another header in its first file, and checksums that go with it."""
    record = victim.checkpoint.manifest.files[0]
    path = victim.path(record.name)
    data = path.read_bytes()
    data = head + data[len(head) :]
    path.write_bytes(data)
    checksums = tuple(xxh3_64_hexdigest(data[at : at + CHUNK]) for at in range(0, len(data), CHUNK))
    files = (replace(record, checksums=checksums), *victim.checkpoint.manifest.files[1:])
    victim.path("manifest.json").write_bytes(to_json(replace(victim.checkpoint.manifest, files=files)))
    found = checkpoints(victim.files).open(1)
    assert found is not None
    return found


@settings(deadline=None, max_examples=100)
@given(at=st.integers(0, 500), new=st.binary(min_size=1, max_size=40))
def test_a_header_that_lies_is_found_and_never_believed(
    tmp_path_factory: pytest.TempPathFactory, at: int, new: bytes
) -> None:
    victim = Victim(tmp_path_factory.mktemp("header"))
    true = victim.checkpoint.manifest.header(victim.checkpoint.manifest.files[0].name)
    at = min(at, len(true) - len(new))
    head = true[:at] + new + true[at + len(new) :]
    found = with_header(victim, head)
    says = [str(damage) for damage in found.damage(thorough=True)]
    name = victim.files.where(f"{FOLDER}/{found.manifest.files[0].name}")
    assert set(says) == (set() if head == true else {f"{name}: its header contradicts the manifest"})
    assert same(load(found), STATE), "where tensors lie is said by the manifest alone"
