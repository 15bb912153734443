"""What was not written is not believed: flipped bytes, missing, cut and grown files, another format. Each is named."""

from collections.abc import Callable

import pytest
from checkpoint_state import CHUNK, checkpoints, load, make_state, same, save, sealed, unsealed

from evenkeel.store.checkpoint_reader import Checkpoint
from evenkeel.store.errors import StoreError
from evenkeel.store.files import Files, open_files
from evenkeel.store.manifest import CheckpointDamaged

STATE = make_state(0)
Change = Callable[[bytes], bytes]


def change(files: Files, name: str, how: Change) -> None:
    data = files.read(name)
    assert data is not None
    files.replace(name, how(data))


def flip(at: int) -> Change:
    return lambda data: data[:at] + bytes([data[at] ^ 0x10]) + data[at + 1 :]


def part_of(checkpoint: Checkpoint, index: int = 0) -> str:
    return f"{checkpoint.folder}/{checkpoint.manifest.files[index].name}"


def test_a_flipped_byte_anywhere_in_a_part() -> None:
    files = open_files("memory://flipped-part")
    found = save(files, STATE, 1)
    name, record = part_of(found), found.manifest.files[0]
    header = len(found.manifest.header(record.name))
    for at in range(0, record.size, 5):
        change(files, name, flip(at))
        (damage,) = found.damage(thorough=True)
        start = at // CHUNK * CHUNK
        stop = min(start + CHUNK, record.size)
        assert str(damage) == f"{files.where(name)}: bytes {start} to {stop} are not what was written"
        if stop > header:
            with pytest.raises(CheckpointDamaged) as caught:
                load(found)
            assert str(caught.value) == str(damage)
        else:
            assert same(load(found), STATE), "where tensors lie is said by the manifest alone"
        change(files, name, flip(at))
    assert list(found.damage(thorough=True)) == []


def test_a_flipped_byte_anywhere_in_the_manifest() -> None:
    """Also in a number or a name, which would be as good as another."""
    files = open_files("memory://flipped-manifest")
    name = f"{save(files, STATE, 1).folder}/manifest.json"
    size = files.sizes("checkpoints/step-00000001")["manifest.json"]
    for at in [*range(0, size, 11), *range(size - 40, size)]:
        change(files, name, flip(at))
        with pytest.raises(CheckpointDamaged) as caught:
            checkpoints(files).open(1)
        assert str(caught.value) == f"{files.where(name)}: is not what was written"
        change(files, name, flip(at))
    assert checkpoints(files).open(1) is not None


@pytest.mark.parametrize("how", [lambda d: d[:-1], lambda d: d[: len(d) // 2], lambda d: b"", lambda d: d + b"\n"])
def test_a_manifest_that_is_cut_or_grown(files: Files, how: Change) -> None:
    name = f"{save(files, STATE, 1).folder}/manifest.json"
    change(files, name, how)
    with pytest.raises(CheckpointDamaged) as caught:
        checkpoints(files).open(1)
    assert str(caught.value) == f"{files.where(name)}: is not what was written"


def test_a_manifest_in_another_steps_folder(files: Files) -> None:
    save(files, STATE, 1)
    data = files.read("checkpoints/step-00000001/manifest.json") or b""
    files.replace("checkpoints/step-00000002/manifest.json", data)
    with pytest.raises(CheckpointDamaged, match=r"step-00000002/manifest\.json: is of step 1"):
        checkpoints(files).open(2)


@pytest.mark.stores("rgw")
@pytest.mark.parametrize(
    ("how", "says", "read_says"),
    [
        (None, "missing", "missing"),
        (lambda d: d[:-1], "has {less} bytes, {size} were written", "ends at byte {less}, {size} were written"),
        (lambda d: b"", "has 0 bytes, {size} were written", "ends at byte {chunk}, {size} were written"),
        (lambda d: d + b"x", "has {more} bytes, {size} were written", None),
    ],
)
def test_a_part_that_is_missing_cut_or_grown(
    files: Files, how: Change | None, says: str, read_says: str | None
) -> None:
    found = save(files, STATE, 1)
    name, size = part_of(found, 1), found.manifest.files[1].size
    if how is None:
        files.remove(name)
    else:
        change(files, name, how)
    good, damaged = checkpoints(files).newest_first()
    first_read = len(found.manifest.header(found.manifest.files[1].name)) // CHUNK * CHUNK
    numbers = {"size": size, "less": size - 1, "more": size + 1, "chunk": first_read}
    assert good == []
    assert str(damaged[1]) == f"{files.where(name)}: {says.format(**numbers)}"
    assert [str(d) for d in found.damage(thorough=True)] == [str(damaged[1])]
    if read_says is None:
        assert same(load(found), STATE), "all that is read is what was written"
        return
    with pytest.raises(CheckpointDamaged) as caught:
        load(found)
    assert str(caught.value) == f"{files.where(name)}: {read_says.format(**numbers)}"


def test_a_file_that_vanishes_between_two_looks(files: Files) -> None:
    found = save(files, STATE, 1)
    assert checkpoints(files).newest_first()[1] == {}
    files.remove_folder(found.folder)
    assert checkpoints(files).open(1) is None
    with pytest.raises(CheckpointDamaged, match="missing"):
        load(found)


def test_a_newer_format_is_refused_by_name_and_not_passed_over(files: Files) -> None:
    save(files, STATE, 1)
    name = f"{save(files, STATE, 2).folder}/manifest.json"
    change(files, name, lambda data: sealed(unsealed(data).replace(b'{"format":1,', b'{"format":7,')))
    for look in (lambda: checkpoints(files).open(2), lambda: checkpoints(files).newest_first()):
        with pytest.raises(StoreError) as caught:
            look()
        assert not isinstance(caught.value, CheckpointDamaged)
        assert str(caught.value) == f"{files.where(name)}: has format 7; this evenkeel reads up to 1, use a newer one"


@pytest.mark.stores("rgw")
def test_the_newest_that_is_whole_is_taken_and_the_others_are_named(files: Files) -> None:
    first, _, missing, cut = (save(files, STATE, step) for step in (1, 2, 3, 4))
    files.remove(part_of(missing))
    change(files, f"{cut.folder}/manifest.json", lambda data: data[:100])
    save(files, STATE, 1, generation=2)
    good, damaged = checkpoints(files).newest_first()
    assert [(c.manifest.version.generation, c.manifest.version.step) for c in good] == [(2, 1), (1, 2)]
    assert {step: str(error) for step, error in damaged.items()} == {
        3: f"{files.where(part_of(missing))}: missing",
        4: f"{files.where(cut.folder)}/manifest.json: is not what was written",
    }
    assert first.folder == good[0].folder


def test_other_folders_are_no_checkpoints(files: Files) -> None:
    save(files, STATE, 7)
    for name in ("step-7", "step-0000000x", "step-000000009", "old"):
        files.replace(f"checkpoints/{name}/manifest.json", b"{}")
    assert checkpoints(files).steps() == [7]
