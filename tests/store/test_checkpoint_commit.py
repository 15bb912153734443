"""A checkpoint becomes visible if it is whole, once, and whoever else writes it too."""

import random
import threading
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
from checkpoint_state import (
    CHUNK,
    CONTENT,
    checkpoints,
    commit,
    load,
    make_state,
    pieces_of,
    same,
    save,
    shapes,
    write_parts,
)

from evenkeel.core.boxes import Box
from evenkeel.core.ids import Version
from evenkeel.store.checkpoint_part import Part
from evenkeel.store.checkpoint_reader import Checkpoint
from evenkeel.store.checkpoints import Checkpoints
from evenkeel.store.errors import StoreError
from evenkeel.store.files import Files
from evenkeel.store.manifest import FileRecord, TensorRecord

pytestmark = pytest.mark.stores("rgw")

AT = Version(5, 3)
STATE, OTHER = make_state(0), make_state(1)
Lie = Callable[[list[Part]], list[Part]]


def first_of(part: Part, change: Callable[[TensorRecord], TensorRecord], tensor: str) -> Part:
    return replace(part, tensors=tuple(change(t) if t.tensor == tensor else t for t in part.tensors))


def everywhere(change: Callable[[TensorRecord], TensorRecord], tensor: str) -> Lie:
    return lambda parts: [first_of(part, change, tensor) for part in parts]


@pytest.mark.parametrize(
    ("lie", "says"),
    [
        (lambda parts: parts[:1], "no part has anything of tensor"),
        (everywhere(lambda t: replace(t, slices=t.slices[1:]), "param/bias"), "is in none of its slices"),
        (lambda parts: [*parts, parts[0]], "two files have one name"),
        (everywhere(lambda t: replace(t, shape=(9, 6)), "param/weight"), "was written with shape (9, 6), not (7, 6)"),
        (everywhere(lambda t: replace(t, tensor="param/new"), "param/weight"), "'param/new' was written, which"),
        (
            lambda parts: [parts[0], first_of(parts[1], lambda t: replace(t, dtype="F32"), "param/weight")],
            "'param/weight' was written as F16 (7, 6) and as F32 (7, 6)",
        ),
    ],
)
def test_parts_that_do_not_add_up_are_refused(files: Files, lie: Lie, says: str) -> None:
    parts = write_parts(files, AT, STATE)
    with pytest.raises(StoreError) as caught:
        commit(files, AT, STATE, lie(parts))
    assert says in str(caught.value)
    assert str(caught.value).startswith(f"{files.where('checkpoints/step-00000005/manifest.json')}: not written: ")
    assert checkpoints(files).open(5) is None


def test_an_element_in_two_parts_is_refused(files: Files) -> None:
    store = checkpoints(files)
    (pieces,) = pieces_of(STATE, 1, random.Random(0))
    parts = [store.write(AT, "w1", pieces), store.write(AT, "w2", [p for p in pieces if p.tensor == "exp_avg/bias"])]
    with pytest.raises(StoreError, match=r"tensor 'exp_avg/bias': element \[0\] is in 2 of its slices"):
        commit(files, AT, STATE, parts)


def test_parts_of_another_generation_are_refused(files: Files) -> None:
    parts = write_parts(files, Version(5, 2), STATE)
    with pytest.raises(StoreError, match=r"g2-w0000\.safetensors: is not of generation 3"):
        commit(files, AT, STATE, parts)


@pytest.mark.parametrize(
    ("left", "says"), [(None, "missing"), (b"short", "has 5 bytes, [0-9]+ were written")], ids=["missing", "cut"]
)
def test_parts_that_are_not_there_are_refused(files: Files, left: bytes | None, says: str) -> None:
    parts = write_parts(files, AT, STATE)
    name = f"checkpoints/step-00000005/{parts[1].file.name}"
    files.remove(name)
    if left is not None:
        files.replace(name, left)
    with pytest.raises(StoreError, match=rf"not written: .*{parts[1].file.name}: {says}"):
        commit(files, AT, STATE, parts)
    assert checkpoints(files).open(5) is None


def test_the_same_version_twice_is_a_success(files: Files) -> None:
    save(files, STATE, 5, generation=3)
    parts = write_parts(files, AT, STATE)
    again = commit(files, AT, STATE, parts, epoch=9)
    assert again.manifest.epoch == 1, "the first one stays"
    assert same(load(again), STATE)


def test_an_older_generation_gives_way_and_a_newer_one_does_not(files: Files) -> None:
    save(files, OTHER, 5, generation=1)
    save(files, STATE, 5, generation=3)
    with pytest.raises(StoreError, match="the step has a checkpoint of generation 3, this is of 2"):
        save(files, OTHER, 5, generation=2)
    found = checkpoints(files).open(5)
    assert found is not None and found.manifest.version == AT
    assert same(load(found), STATE)


def test_a_damaged_one_gives_way(files: Files) -> None:
    files.replace("checkpoints/step-00000005/manifest.json", b"garbage")
    assert same(load(save(files, STATE, 5)), STATE)
    assert checkpoints(files).newest_first()[1] == {}


def test_a_manifest_that_nobody_would_read_is_not_written(files: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("evenkeel.store.checkpoints.MAX_MANIFEST_BYTES", 1000)
    with pytest.raises(StoreError, match=r"manifest\.json: not written: it has \d+ bytes, at most 1000 are read"):
        save(files, STATE, 5)


def test_a_worker_after_whom_no_file_can_be_named(files: Files) -> None:
    with pytest.raises(ValueError, match=r"worker '\.\./w': a file cannot be named after it"):
        checkpoints(files).write(AT, "../w", [])


def at_once(calls: list[Callable[[], Checkpoint]]) -> list[Checkpoint | StoreError]:
    """What each of the calls, begun together in threads, returned or raised."""
    barrier = threading.Barrier(len(calls))
    results: list[Checkpoint | StoreError] = []

    def run(call: Callable[[], Checkpoint]) -> None:
        barrier.wait()
        try:
            results.append(call())
        except StoreError as error:
            results.append(error)

    threads = [threading.Thread(target=run, args=(call,)) for call in calls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def test_of_two_who_commit_one_version_at_once_one_wins_and_both_succeed(files: Files) -> None:
    for step in range(1, 9):
        at = Version(step, 1)
        parts = write_parts(files, at, STATE)
        store = checkpoints(files)
        calls = [
            lambda epoch=epoch: store.commit(at, CONTENT, parts, shapes(STATE), epoch=epoch)  # noqa: B023
            for epoch in (1, 2, 3)
        ]
        results = at_once(calls)
        winner = store.open(step)
        assert winner is not None
        assert [result.manifest for result in results if isinstance(result, Checkpoint)] == [winner.manifest] * 3


def test_of_two_generations_at_once_the_newer_one_stays(files: Files) -> None:
    for step in range(1, 9):
        calls = [
            lambda: save(files, OTHER, step, generation=1),  # noqa: B023
            lambda: save(files, STATE, step, generation=2),  # noqa: B023
        ]
        for result in at_once(calls):
            assert isinstance(result, Checkpoint) or "generation 2, this is of 1" in str(result)
        found = checkpoints(files).open(step)
        assert found is not None and found.manifest.version.generation == 2
        assert same(load(found), STATE)


class Stalled:
    """Files whose user stands still when it has read a manifest for the first time, until something has happened."""

    def __init__(self, files: Files, meanwhile: Callable[[], None]) -> None:
        self._files, self._then = files, [meanwhile]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._files, name)

    def read(self, name: str, offset: int = 0) -> bytes | None:
        data = self._files.read(name, offset)
        if name.endswith("manifest.json") and self._then:
            self._then.pop()()
        return data


@pytest.mark.stores("moto", "rgw")
def test_of_three_generations_one_that_stood_still_does_not_overwrite_the_newest(files: Files, store: str) -> None:
    """A controller of the second has seen the first's, and is stopped; that of the third commits meanwhile."""
    if store == "memory":
        pytest.skip("it knows no condition but that there is no such file: see Files.replace_if")
    save(files, OTHER, 5, generation=1)
    parts = write_parts(files, Version(5, 2), OTHER)
    newest = threading.Thread(target=save, args=(files, STATE, 5, 3))

    def meanwhile() -> None:
        newest.start()
        newest.join(1.0 if store == "local" else None)  # there it waits for whoever has looked

    refused = pytest.raises(StoreError, match="the step has a checkpoint of generation 3, this is of 2")
    with nullcontext() if store == "local" else refused:
        Checkpoints(Stalled(files, meanwhile), CHUNK).commit(Version(5, 2), CONTENT, parts, shapes(OTHER), epoch=2)
    newest.join()
    found = checkpoints(files).open(5)
    assert found is not None and found.manifest.version == AT
    assert same(load(found), STATE)


def test_writers_of_one_checkpoint_do_not_collide(files: Files) -> None:
    store = checkpoints(files)
    pieces = pieces_of(STATE, 8, random.Random(3))
    parts: dict[int, Part] = {}

    def write(i: int) -> None:
        parts[i] = store.write(AT, f"w{i}", pieces[i])

    threads = [threading.Thread(target=write, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert same(load(commit(files, AT, STATE, [parts[i] for i in range(8)])), STATE)


def test_a_part_may_be_written_again(files: Files) -> None:
    """A worker that was told of an error tries again, though the first try may have succeeded."""
    assert write_parts(files, AT, STATE) == write_parts(files, AT, STATE)
    assert len(files.names("checkpoints/step-00000005")) == 2


def test_lies_about_places_are_refused(files: Files) -> None:
    """Parts come over the network: they are believed no more than a manifest."""

    def moved(tensor: TensorRecord) -> TensorRecord:
        return replace(tensor, slices=tuple(replace(s, start=s.start + 1, stop=s.stop + 1) for s in tensor.slices))

    def outside(tensor: TensorRecord) -> TensorRecord:
        box = Box((0, 0), (8, 6))
        return replace(tensor, slices=tuple(replace(s, box=box) for s in tensor.slices))

    parts = write_parts(files, AT, STATE)
    for lie, says in ((moved, "are not those of its box"), (outside, "is not within the tensor's shape")):
        with pytest.raises(StoreError, match=says):
            commit(files, AT, STATE, everywhere(lie, "param/weight")(parts))
    grown = replace(parts[0], file=FileRecord("g3-x.safetensors", 10, 64, ("0" * 16,)))
    with pytest.raises(StoreError, match=r"file 'g3-w0000\.safetensors' is not among the files"):
        commit(files, AT, STATE, [grown, parts[1]])
