"""A file that the disk does not give back: its checkpoint is named and left, but not where all of the store is out."""

import errno
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from checkpoint_state import as_bytes, make_state, same, save

from evenkeel.control import messages as m
from evenkeel.core.boxes import full
from evenkeel.core.ids import Version
from evenkeel.runtime import saving
from evenkeel.store.checkpoint_reader import Want
from evenkeel.store.errors import StoreError
from evenkeel.store.files import LocalFiles
from evenkeel.store.manifest import CheckpointDamaged
from evenkeel.store.run_directory import RunDirectory

STATE = make_state(0)
UNREADABLE = Path("/proc/self/mem")
"""Linux opens it for everybody and answers EIO to whoever reads its first bytes, where nothing is mapped."""


@contextmanager
def failing(path: Path) -> Iterator[None]:
    """Reading that file is an error for as long as the block lasts."""
    aside = path.with_name(f"{path.name}-aside")
    path.rename(aside)
    path.symlink_to(UNREADABLE)
    try:
        yield
    finally:
        aside.replace(path)


def read(run: RunDirectory, moved: Callable[[], None] = lambda: None) -> None:
    got = {name: np.zeros_like(value) for name, value in STATE.items()}
    wants = [Want(name, full(value.shape), as_bytes(value), shape=value.shape) for name, value in got.items()]
    saving.read(run, Version(3, 1), wants, moved)
    assert same(got, STATE)


class Second:
    """Calls a function when it is called the second time: after the first batch could not be read."""

    def __init__(self, happens: Callable[[], object]) -> None:
        self.calls = 0
        self._happens = happens

    def __call__(self) -> None:
        self.calls += 1
        if self.calls == 2:
            self._happens()


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    run = RunDirectory.at(str(tmp_path))
    save(run.files, STATE, 3)
    return run


def test_there_is_such_an_error() -> None:
    with UNREADABLE.open("rb", buffering=0) as file, pytest.raises(OSError) as error:
        file.read(1)
    assert error.value.errno == errno.EIO


def test_a_part_that_cannot_be_read_is_damage(run: RunDirectory, tmp_path: Path) -> None:
    part = tmp_path / "checkpoints" / "step-00000003" / "g1-w0001.safetensors"
    with failing(part), pytest.raises(CheckpointDamaged, match=rf"^{part}: Input/output error$"):
        read(run)
    read(run)


def test_where_not_even_the_manifest_can_be_read_it_is_the_store(run: RunDirectory, tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints" / "step-00000003"
    with failing(folder / "manifest.json"), pytest.raises(StoreError, match=r"manifest\.json: Input/") as error:
        read(run)
    assert not isinstance(error.value, CheckpointDamaged)


def test_a_store_that_goes_away_while_a_part_is_read_condemns_nothing(run: RunDirectory, tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints" / "step-00000003"
    with ExitStack() as out:
        out.enter_context(failing(folder / "g1-w0001.safetensors"))
        second = Second(lambda: out.enter_context(failing(folder / "manifest.json")))
        with pytest.raises(StoreError, match=r"manifest\.json: Input/output error") as error:
            read(run, second)
        assert not isinstance(error.value, CheckpointDamaged) and second.calls == 2
    read(run)


def test_a_store_that_comes_back_is_read_again(run: RunDirectory, tmp_path: Path) -> None:
    """It was out for longer than it is waited for."""
    out = ExitStack()
    out.enter_context(failing(tmp_path / "checkpoints" / "step-00000003" / "g1-w0001.safetensors"))
    second = Second(out.close)
    read(run, second)
    assert second.calls == 2


# ---------------------------------------------------------------- which file it is, and a second look at that


FIRST, SECOND = "g1-w0000.safetensors", "g1-w0001.safetensors"


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)


def look(run: RunDirectory, file: str = "") -> str:
    """What the controller says of the checkpoint when it has looked at that file."""
    looked = saving.look(run, m.LookAt(Version(3, 1), file))
    assert (looked.version, looked.file) == (Version(3, 1), file)
    return looked.error


@dataclass
class Ailing(LocalFiles):
    """Answers an error of the disk to the next so many who read a part."""

    root: Path
    fails: int

    def read_into(self, name: str, offset: int, buffer: memoryview) -> int | None:
        if self.fails:
            self.fails -= 1
            raise StoreError(f"{self.where(name)}: Input/output error")
        return super().read_into(name, offset, buffer)


@pytest.mark.parametrize("how", [flip, Path.unlink, lambda part: part.write_bytes(b"cut")])
def test_a_worker_names_the_file_and_the_controller_sees_the_same(
    how: Callable[[Path], object], run: RunDirectory, tmp_path: Path
) -> None:
    part = tmp_path / "checkpoints" / "step-00000003" / SECOND
    assert look(run) == look(run, FIRST) == look(run, SECOND) == ""
    how(part)
    with pytest.raises(CheckpointDamaged, match=rf"^{part}: ") as error:
        read(run)
    assert error.value.file == SECOND
    assert look(run, SECOND).startswith(f"{part}: ")


def test_only_the_named_file_is_read_as_a_checkpoint_may_be_large(run: RunDirectory, tmp_path: Path) -> None:
    part = tmp_path / "checkpoints" / "step-00000003" / SECOND
    flip(part)
    assert look(run) == look(run, FIRST) == ""
    assert look(run, SECOND).startswith(f"{part}: bytes ")
    part.unlink()
    assert look(run, FIRST) == f"{part}: missing"


def test_to_who_has_no_such_folder_it_is_gone_and_the_controller_sees_it_whole(
    run: RunDirectory, tmp_path: Path
) -> None:
    """As where the store is not mounted on a worker's node."""
    elsewhere = RunDirectory.at(str(tmp_path / "elsewhere"))
    gone = f"{tmp_path}/elsewhere/checkpoints/step-00000003: the checkpoint of step 3, generation 1, is gone"
    with pytest.raises(CheckpointDamaged) as error:
        read(elsewhere)
    assert (str(error.value), error.value.file) == (gone, "")
    assert (look(run), look(elsewhere)) == ("", gone)


def test_of_another_generation_it_is_not_there(run: RunDirectory) -> None:
    looked = saving.look(run, m.LookAt(Version(3, 2)))
    assert looked.error.endswith("generation 2, is now that of generation 1")


def test_an_error_of_the_disk_is_damage_to_the_controller_if_it_comes_twice(run: RunDirectory, tmp_path: Path) -> None:
    part = tmp_path / "checkpoints" / "step-00000003" / SECOND
    assert look(RunDirectory(Ailing(tmp_path, 1)), SECOND) == ""
    assert look(RunDirectory(Ailing(tmp_path, 2)), SECOND) == f"{part}: Input/output error"
    with pytest.raises(CheckpointDamaged) as error:
        read(RunDirectory(Ailing(tmp_path, 2)))
    assert error.value.file in (FIRST, SECOND)


def test_a_controller_without_its_store_condemns_nothing(run: RunDirectory, tmp_path: Path) -> None:
    with failing(tmp_path / "checkpoints" / "step-00000003" / "manifest.json"):
        with pytest.raises(StoreError, match=r"manifest\.json: Input/output error") as error:
            look(run, SECOND)
        assert not isinstance(error.value, CheckpointDamaged)
