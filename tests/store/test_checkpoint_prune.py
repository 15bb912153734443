"""What is removed, and above all what is not: the last good one, and what is being written."""

import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any, cast

import pytest
from checkpoint_state import checkpoints, commit, load, make_state, same, save, write_parts
from hypothesis import given, settings
from hypothesis import strategies as st

from evenkeel.core.ids import Version
from evenkeel.store.files import Files, LocalFiles, ObjectFiles, open_files
from evenkeel.store.manifest import part_generation

pytestmark = pytest.mark.stores("rgw")

STATE = make_state(0)
HALF = bytes(1 << 16)
SMALL = {"param/bias": STATE["param/bias"]}


def step(number: int) -> str:
    return f"checkpoints/step-{number:08d}"


def kept(files: Files) -> list[int]:
    """Steps of the complete checkpoints that can be loaded, newest first."""
    good, _ = checkpoints(files).newest_first()
    assert all(same(load(found), STATE) for found in good)
    return [found.manifest.version.step for found in good]


def test_all_but_the_newest(files: Files) -> None:
    for number in (10, 20, 30, 40):
        save(files, STATE, number)
    assert checkpoints(files).prune(keep=2) == [10, 20]
    assert kept(files) == [40, 30]
    assert files.folders("checkpoints") == ["step-00000030", "step-00000040"]
    assert checkpoints(files).prune(keep=2) == []


def test_what_was_given_up_is_not_counted(files: Files) -> None:
    """The run went back from 20 to 10 and has come to 30: were the newest damaged, 10 is the one to begin from."""
    save(files, STATE, 10)
    save(files, STATE, 20)
    save(files, STATE, 30, generation=2)
    assert checkpoints(files).prune(2, {Version(10, 1)}) == [20]
    assert kept(files) == [30, 10]


def test_the_last_whose_copies_agreed_stays_however_many_are_newer(files: Files) -> None:
    for number in (10, 20, 30, 40):
        save(files, STATE, number)
    assert checkpoints(files).prune(2, agreed=Version(20, 1)) == [10]
    assert kept(files) == [40, 30, 20]
    assert checkpoints(files).prune(1, agreed=Version(20, 2)) == [20, 30], "it is of another generation"
    assert checkpoints(files).prune(1, {Version(40, 1)}, Version(40, 1)) == []


def test_what_was_imported_stays_as_the_run_begins_from_it(files: Files) -> None:
    """Of step 0 or of a later one; and damaged, too, unlike what the run has made."""
    for number in (0, 3):
        save(files, STATE, number, generation=0)
    lost = save(files, STATE, 5, generation=0)
    for number in (10, 20, 30):
        save(files, STATE, number)
    for found in (lost, save(files, STATE, 8)):
        files.remove(f"{found.folder}/{found.manifest.files[0].name}")
    assert checkpoints(files).prune(1, {Version(20, 1)}) == [8, 10, 20]
    assert kept(files) == [30, 3, 0]
    assert checkpoints(files).steps() == [0, 3, 5, 30]


def test_an_import_without_its_manifest_is_damaged_and_no_other(files: Files) -> None:
    write_parts(files, Version(5, 0), STATE)
    write_parts(files, Version(7, 1), STATE)
    good, damaged = checkpoints(files).newest_first()
    assert good == [] and damaged.keys() == {5}
    assert f"{step(5)}/manifest.json: missing: the import did not end well" in str(damaged[5])
    save(files, STATE, 10)
    assert checkpoints(files).prune(1) == []
    assert checkpoints(files).steps() == [5, 10]


class Meanwhile:
    """Files of which something happens between the reading of a manifest and what is looked at next."""

    def __init__(self, files: Files, happens: Callable[[], object]) -> None:
        self._files, self._happens = files, [happens]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._files, name)

    def read(self, name: str) -> bytes | None:
        data = self._files.read(name)
        while self._happens:
            self._happens.pop()()
        return data


def test_what_is_removed_while_one_looks_is_not_damaged(files: Files) -> None:
    """A run goes on while `evenkeel checkpoint ls` or `verify` look at what it has."""
    save(files, STATE, 10)
    save(files, STATE, 20)
    meanwhile = cast(Files, Meanwhile(files, lambda: checkpoints(files).prune(keep=1)))
    good, damaged = checkpoints(meanwhile).newest_first()
    assert ([found.manifest.version.step for found in good], damaged) == ([20], {})


@pytest.mark.parametrize("thorough", [False, True])
def test_what_is_written_anew_while_one_looks_is_not_damaged(files: Files, thorough: bool) -> None:
    """The run went back: the step's new checkpoint takes the place of the old one, whose parts are removed."""
    save(files, STATE, 10)

    def again() -> None:
        save(files, STATE, 10, generation=2)
        checkpoints(files).prune(keep=1)

    looked = checkpoints(cast(Files, Meanwhile(files, again))).look(10, thorough)
    assert looked is not None and looked[1] == []
    assert looked[0].manifest.version == Version(10, 2) and same(load(looked[0]), STATE)


def test_at_least_one_is_kept(files: Files) -> None:
    save(files, STATE, 10)
    with pytest.raises(ValueError, match="keep is 0; at least 1 checkpoint must stay"):
        checkpoints(files).prune(keep=0)
    assert checkpoints(files).prune(keep=1) == []
    assert kept(files) == [10]


def test_the_last_good_one_stays_whatever_is_newer(files: Files) -> None:
    """Damaged and half-written ones do not count; they stay as long as their like."""
    save(files, STATE, 10)
    files.remove(f"{save(files, STATE, 20).folder}/g1-w0000.safetensors")
    files.replace(f"{save(files, STATE, 30).folder}/manifest.json", b"garbage")
    write_parts(files, Version(40, 1), STATE)
    assert checkpoints(files).prune(keep=1) == []
    assert kept(files) == [10]
    assert checkpoints(files).steps() == [10, 20, 30, 40]
    save(files, STATE, 50)
    assert checkpoints(files).prune(keep=2) == []
    assert kept(files) == [50, 10]
    save(files, STATE, 60)
    assert checkpoints(files).prune(keep=2) == [10, 20, 30]
    assert checkpoints(files).steps() == [50, 60]


def test_without_a_complete_one_nothing_goes(files: Files) -> None:
    write_parts(files, Version(10, 1), STATE)
    write_parts(files, Version(20, 2), STATE)
    assert checkpoints(files).prune(keep=1) == []
    assert checkpoints(files).steps() == [10, 20]


def test_what_was_never_completed_goes_once_something_newer_is(tmp_path: Path) -> None:
    files = LocalFiles(tmp_path)
    write_parts(files, Version(10, 1), STATE)
    (tmp_path / step(10) / ".g1-w0007.safetensors.tmp-0123").write_bytes(b"its writer was killed")
    write_parts(files, Version(20, 1), STATE)
    save(files, STATE, 20, generation=2)
    assert checkpoints(files).prune(keep=1) == []
    assert files.folders("checkpoints") == ["step-00000020"]
    assert files.names(step(20)) == ["g2-w0000.safetensors", "g2-w0001.safetensors", "manifest.json"]
    assert kept(files) == [20]


def test_what_is_being_written_is_not_touched(files: Files) -> None:
    """A newer step; and, as the run may go back, a newer generation of the same step or of one before."""
    save(files, STATE, 20, generation=2)
    newer = [Version(30, 2), Version(20, 3), Version(10, 3)]
    parts = {version: write_parts(files, version, STATE) for version in newer}
    with files.stream(f"{step(40)}/g2-w0000.safetensors") as sink:
        sink.write(b"half")
        assert checkpoints(files).prune(keep=1) == []
        sink.write(b"way")
    assert files.read(f"{step(40)}/g2-w0000.safetensors") == b"halfway"
    for version in newer:
        assert same(load(commit(files, version, STATE, parts[version])), STATE)


def leave(files: Files, name: str) -> None:
    """What stays of a file whose writer is killed."""
    if isinstance(files, LocalFiles):
        path = files.path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.with_name(f".{path.name}.tmp-0123").write_bytes(HALF)
        return
    assert isinstance(files, ObjectFiles)
    bucket, key, _ = files.fs.split_path(files.where(name))
    upload = files.fs.call_s3("create_multipart_upload", Bucket=bucket, Key=key)["UploadId"]
    files.fs.call_s3("upload_part", Bucket=bucket, Key=key, UploadId=upload, PartNumber=1, Body=HALF)


def begun(files: Files) -> set[str]:
    """The names of all files that were begun and are not finished."""
    names: set[str] = set()

    def keep(name: str) -> bool:
        names.add(name)
        return False

    assert files.drop_unfinished("", keep) == 0
    return names


@pytest.mark.stores("moto", "rgw")
def test_a_part_that_was_begun_and_is_overtaken_goes_and_no_other_does(url: str, store: str) -> None:
    """All were killed before a part was whole, so an object store lists nothing of the step; or it was redone."""
    if store == "memory":
        pytest.skip("there a file is seen as soon as it is begun")
    files = open_files(url, {"default_block_size": len(HALF)} if url.startswith("s3:") else None)
    overtaken = {f"{step(number)}/g1-w0000.safetensors" for number in (10, 20, 30)}
    for name in overtaken:
        leave(files, name)
    assert begun(files) == overtaken
    save(files, STATE, 20, generation=2)
    others = {f"{step(20)}/g3-w0000.safetensors", f"{step(30)}/g2-w0000.safetensors", "checkpoints/step-30/g1-w0.txt"}
    with ExitStack() as writers:
        for name in others:
            writers.enter_context(files.stream(name)).write(HALF)
        assert checkpoints(files).prune(keep=1) == []
        assert begun(files) == others
    assert begun(files) == set()
    assert all(files.read(name) == HALF for name in others)
    assert kept(files) == [20]


def test_after_going_back_what_came_after_is_removed_and_what_was_before_is_kept(files: Files) -> None:
    for number in (10, 20, 30):
        save(files, STATE, number)
    being_written = write_parts(files, Version(30, 2), STATE)
    save(files, STATE, 15, generation=2)
    assert kept(files) == [15, 30, 20, 10]
    assert checkpoints(files).prune(keep=2) == [20, 30]
    assert kept(files) == [15, 10]
    assert same(load(commit(files, Version(30, 2), STATE, being_written)), STATE)


def test_what_is_not_ours_stays(files: Files) -> None:
    for number in (10, 20):
        save(files, STATE, number)
    files.replace(f"{step(10)}/notes.txt", b"of the user")
    files.replace("checkpoints/step-old/notes.txt", b"of the user")
    assert checkpoints(files).prune(keep=1) == [10]
    assert files.names(step(10)) == ["notes.txt"]
    assert files.names("checkpoints/step-old") == ["notes.txt"]


histories = st.lists(
    st.tuples(st.integers(1, 5), st.integers(1, 4), st.sampled_from(["complete", "half-written", "damaged"])),
    max_size=8,
)


@settings(deadline=None, max_examples=60)
@given(history=histories, keep=st.integers(1, 3))
def test_any_history_against_what_must_hold(history: list[tuple[int, int, str]], keep: int) -> None:
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        files = LocalFiles(Path(folder))
        for number, generation, fate in sorted(history, key=lambda h: (h[1], h[0])):
            version = Version(number, generation)
            parts = write_parts(files, version, SMALL)
            if fate != "half-written":
                found = commit(files, version, SMALL, parts)
                if fate == "damaged":
                    files.remove(f"{found.folder}/{found.manifest.files[0].name}")
        before, _ = checkpoints(files).newest_first()
        everything = parts_there(files)
        removed = checkpoints(files).prune(keep)
        after, damaged = checkpoints(files).newest_first()

        if not before:
            assert removed == [] and parts_there(files) == everything
            return
        newest = before[0].manifest.version
        line = [found for found in before if found.manifest.version.step <= newest.step]
        assert [c.manifest.version for c in after] == [c.manifest.version for c in line[:keep]]
        assert all(same(load(found), SMALL) for found in after)
        age = newest.generation, newest.step
        own = {(found.manifest.version.step, file.name) for found in after for file in found.manifest.files}
        for number, name in everything:
            expected = (part_generation(name), number) > age or (number, name) in own or number in damaged
            assert ((number, name) in parts_there(files)) == expected, (number, name)


def parts_there(files: Files) -> set[tuple[int, str]]:
    found = {(number, name) for number in checkpoints(files).steps() for name in files.names(step(number))}
    return {(number, name) for number, name in found if part_generation(name) is not None}
