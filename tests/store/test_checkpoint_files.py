"""What checkpoints ask of Files beyond whole files: byte ranges, sizes, folders."""

import os

import pytest

from evenkeel.store.files import Files, LocalFiles

pytestmark = pytest.mark.stores("moto", "rgw")


def test_a_byte_range_fills_the_callers_buffer(files: Files) -> None:
    assert files.read_into("c/a", 0, memoryview(bytearray(1))) is None
    files.replace("c/a", bytes(range(10)))
    buffer = bytearray(b"\xff" * 4)
    assert files.read_into("c/a", 3, memoryview(buffer)) == 4
    assert buffer == bytes([3, 4, 5, 6])
    assert files.read_into("c/a", 8, memoryview(buffer)) == 2, "the file ends"
    assert buffer == bytes([8, 9, 5, 6])
    assert files.read_into("c/a", 10, memoryview(buffer)) == 0
    assert files.read_into("c/a", 99, memoryview(buffer)) == 0
    assert buffer == bytes([8, 9, 5, 6])


def test_sizes_and_folders(files: Files) -> None:
    assert files.sizes("c") == {} and files.folders("c") == []
    files.replace("c/two", b"22")
    files.replace("c/one", b"1")
    files.replace("c/deep/x", b"x")
    files.replace("c/also/x", b"x")
    assert files.sizes("c") == {"one": 1, "two": 2}
    files.replace("top", b"123")
    assert files.sizes("") == {"top": 3}
    assert files.folders("c") == ["also", "deep"]


def test_a_folder_is_removed_with_what_a_killed_writer_left_in_it(files: Files) -> None:
    files.remove_folder("c")
    files.replace("c/a", b"1")
    files.replace("kept", b"1")
    if isinstance(files, LocalFiles):
        (files.root / "c" / ".b.tmp-0123").write_bytes(b"half")
    files.remove_folder("c")
    assert files.names("c") == [] and files.names("") == ["kept"]
    if isinstance(files, LocalFiles):
        assert os.listdir(files.root) == ["kept"]
