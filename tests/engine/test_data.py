"""Text as windows of bytes, from a file, a directory and the standard library; and what is wrong with bad paths."""

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch

from evenkeel.config_values import ConfigError
from evenkeel.data.dataset import Data, TensorDataset
from evenkeel.data.registry import load_data
from evenkeel.models.registry import load_model


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def text_file(folder: Path, length: int) -> Path:
    file = folder / "text.bin"
    file.write_bytes(bytes(i % 251 for i in range(length)))
    return file


def test_samples_are_neighbouring_windows_with_the_next_byte_as_target(tmp_path: Path) -> None:
    data = load_data("text", {"path": str(text_file(tmp_path, 101)), "seq_len": 10, "eval_share": 0.2})
    assert data.eval is not None
    assert (len(data.train), len(data.eval)) == (8, 2)
    inputs, targets = data.train.get([0, 3])
    assert inputs.dtype == targets.dtype == torch.int64
    assert inputs.tolist() == [list(range(10)), list(range(30, 40))]
    assert targets.tolist() == [list(range(1, 11)), list(range(31, 41))]
    held_out, _ = data.eval.get([1])
    assert held_out.tolist() == [list(range(90, 100))]
    with pytest.raises(IndexError):
        data.train.get([8])


@pytest.mark.parametrize(
    ("length", "share", "sizes"), [(101, 0.0, (10, 0)), (101, 0.99, (1, 9)), (20, 0.5, (1, 0)), (101, 0.01, (9, 1))]
)
def test_shares_for_validation(tmp_path: Path, length: int, share: float, sizes: tuple[int, int]) -> None:
    data = load_data("text", {"path": str(text_file(tmp_path, length)), "seq_len": 10, "eval_share": share})
    assert (len(data.train), 0 if data.eval is None else len(data.eval)) == sizes


def test_a_text_of_its_own_for_validation(tmp_path: Path) -> None:
    (tmp_path / "other.txt").write_bytes(b"ab" * 21)
    path, other = str(text_file(tmp_path, 101)), str(tmp_path / "other.txt")
    data = load_data("text", {"path": path, "eval_path": other, "seq_len": 10})
    assert data.eval is not None
    assert (len(data.train), len(data.eval)) == (10, 4)
    assert bytes(data.eval.get([0])[0][0].tolist()) == b"ababababab"


def test_the_models_sequence_length_unless_told_otherwise(tmp_path: Path) -> None:
    model = load_model("decoder", {"seq_len": 20})
    path = str(text_file(tmp_path, 101))
    assert load_data("text", {"path": path}, model).train.get([0])[0].shape == (1, 20)
    assert load_data("text", {"path": path, "seq_len": 5}, model).train.get([0])[0].shape == (1, 5)


def test_directories_in_order_of_their_paths_once_read_and_then_cached(tmp_path: Path) -> None:
    root = tmp_path / "texts"
    for name, content in {"b.txt": b"BBBB", "a/z.txt": b"zzzz", ".hidden": b"no", "a/y.md": b"md"}.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    options = {"path": str(root), "suffix": ".txt", "seq_len": 7, "eval_share": 0.0}
    first = load_data("text", options).train
    assert bytes(first.get([0])[0][0].tolist()) == b"zzzzBBB"
    assert len(list((tmp_path / "cache" / "evenkeel").iterdir())) == 1
    assert load_data("text", options).train.fingerprint() == first.fingerprint()
    (root / "b.txt").write_bytes(b"CCCC!")
    changed = load_data("text", options).train
    assert bytes(changed.get([0])[0][0].tolist()) == b"zzzzCCC"
    assert changed.fingerprint() != first.fingerprint()


def test_a_directory_that_cannot_hold_the_cache_does_no_harm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("not a directory")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_bytes(b"x" * 50)
    assert len(load_data("text", {"path": str(tmp_path / "texts"), "seq_len": 7, "eval_share": 0.0}).train) == 7


def test_the_standard_library_read_by_five_processes_at_once(tmp_path: Path) -> None:
    code = (
        "from hashlib import sha256; from evenkeel.data.corpus import read_corpus;"
        "print(sha256(read_corpus('stdlib', None, 'data.path').text).hexdigest())"
    )
    paths = {"PYTHONPATH": os.pathsep.join(sys.path), "XDG_CACHE_HOME": str(tmp_path / "shared")}
    readers = [
        subprocess.Popen([sys.executable, "-c", code], env={**os.environ, **paths}, stdout=subprocess.PIPE)
        for _ in range(5)
    ]
    prints = [reader.communicate()[0] for reader in readers]
    assert len(set(prints)) == 1 and len(prints[0].strip()) == 64
    (cached,) = (tmp_path / "shared" / "evenkeel").iterdir()
    assert cached.stat().st_size > 5_000_000
    text = cached.read_bytes()
    root = Path(sysconfig.get_path("stdlib"))
    assert (root / "asyncio" / "runners.py").read_bytes() in text
    assert b"build_time_vars = {" not in text


@pytest.mark.parametrize("whole", [10**6, 1000])
def test_a_fingerprint_tells_texts_apart_also_where_it_looks_at_places_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: int
) -> None:
    monkeypatch.setattr("evenkeel.data.text.PRINTED_WHOLE", whole)
    monkeypatch.setattr("evenkeel.data.text.PLACES", 10)
    text = bytes(i % 251 for i in range(30_001))
    file = tmp_path / "text"

    def fingerprint(content: bytes) -> str:
        file.write_bytes(content)
        data = load_data("text", {"path": str(file), "seq_len": 10, "eval_share": 0.0})
        assert data.vocab_size == 256
        return data.train.fingerprint()

    others = [text[:-10], text + bytes(10), b"x" + text[1:], text[:-1] + b"x", b"insert" + text, text[::-1]]
    assert len({fingerprint(content) for content in (text, *others)}) == 7
    assert fingerprint(text) == fingerprint(text)


@pytest.mark.parametrize(
    ("options", "key", "words"),
    [
        ({"path": "nowhere/to/be.found"}, "data.path", "no file or directory nowhere/to/be.found"),
        ({"path": "https://me:hush/hush@host/text"}, "data.path", r"no file or directory https://\*\*\*@host/text$"),
        ({"path": "EMPTY"}, "data.path", "is empty"),
        ({"path": "SHORT"}, "data.path", r"5 bytes; one sample takes seq_len \+ 1 = 129"),
        ({"path": "FOLDER", "suffix": ".none"}, "data.path", "no files that end in .none"),
        ({"path": "LONG", "eval_path": "missing.txt"}, "data.eval_path", "missing.txt"),
        ({"path": "LONG", "eval_share": 1.5}, "data.eval_share", "0 <= eval_share < 1"),
        ({"path": "LONG", "seq_len": "long"}, "data.seq_len", "whole number"),
        ({"path": "LONG", "sequence": 3}, "data.sequence", "nearest valid key"),
    ],
)
def test_bad_input_names_the_key(tmp_path: Path, options: dict[str, object], key: str, words: str) -> None:
    (tmp_path / "EMPTY").touch()
    (tmp_path / "SHORT").write_bytes(b"short")
    (tmp_path / "LONG").write_bytes(b"long" * 1000)
    (tmp_path / "FOLDER").mkdir()
    here = {k: str(tmp_path / v) if isinstance(v, str) and v.isupper() else v for k, v in options.items()}
    with pytest.raises(ConfigError, match=words) as caught:
        load_data("text", here)
    assert caught.value.key == key


def test_a_text_that_is_written_to_while_it_is_in_use_is_refused(tmp_path: Path) -> None:
    file = text_file(tmp_path, 1001)
    data = load_data("text", {"path": str(file), "seq_len": 10}).train
    before = data.get([3])[0]
    other = tmp_path / "other"
    other.write_bytes(b"x" * 1001)
    os.replace(other, file)  # what is in use stays as it is
    assert torch.equal(data.get([3])[0], before)
    data = load_data("text", {"path": str(file), "seq_len": 10}).train
    file.write_bytes(b"cut off")
    with pytest.raises(ValueError, match=r"data\.path: .* was written to while it is in use"):
        data.get([3])


def test_unknown_datasets() -> None:
    with pytest.raises(ConfigError, match="expected one of digits, text"):
        load_data("tekst", {})
    with pytest.raises(ConfigError, match="returned dict"):
        load_data("builtins:dict", {})


def test_tensors_in_memory() -> None:
    data = Data(TensorDataset(torch.arange(12.0).view(6, 2), torch.arange(6)))
    inputs, targets = data.train.get([4, 1])
    assert inputs.tolist() == [[8.0, 9.0], [2.0, 3.0]] and targets.tolist() == [4, 1]
    same = TensorDataset(torch.arange(12.0).view(6, 2), torch.arange(6))
    other = TensorDataset(torch.arange(12.0).view(6, 2), torch.arange(6) + 1)
    assert data.train.fingerprint() == same.fingerprint() != other.fingerprint()


def test_digits() -> None:
    pytest.importorskip("sklearn", reason="digits come with scikit-learn, which is not installed")
    data = load_data("digits", {})
    inputs, targets = data.train.get(range(16))
    assert inputs.shape == (16, 64) and inputs.min() >= 0 and inputs.max() == 1
    assert targets.dtype == torch.int64 and data.eval is not None
    assert len(data.train) + len(data.eval) == 1797
