"""The small files of a run, made up: whatever is in them, it is told in one short line that names the file."""

import json
import shlex
import sys
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
from checkpoint_state import make_state, save
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from lies import places

from evenkeel.cli import main
from evenkeel.store.errors import StoreError
from evenkeel.store.files import LocalFiles
from evenkeel.store.journal import Journal
from evenkeel.store.lease import SHOWN, Holder, acquire, read_lease
from evenkeel.store.lines import LineReader
from evenkeel.store.run_directory import RunDirectory, RunRecord
from evenkeel.store.untrusted import MAX_DEPTH, parse_json, short
from evenkeel.tools.exporting import read_origin

RUN = json.dumps({
    "format": 1, "name": "test", "status": "running", "started": 1.0, "updated": 2.0, "ended": None, "error": "",
    "waiting_for": "", "versions": {"torch": "2.13.0"},
}).encode()  # fmt: skip
ORIGIN = b'{"format": 1, "step": 1, "generation": 0, "samples": 0, "seed": 0}'
JOURNAL = b'{"format": 1, "epoch": 1, "nonce": "x", "entries": [{"type": "EpochBegun", "epoch": 1}]}'
METRICS = b'{"step": 1, "generation": 1, "time": 1.5, "loss": 0.5, "world_size": 2}'
EVENT = b'{"event": "checkpoint_committed", "checkpoint": 1, "time": 1.5, "step": 1, "generation": 1}'


def lease() -> bytes:
    """As it is written."""
    files = Memory()
    assert acquire(files, Holder.this("cluster"), lambda seconds: False)
    return files.data[SHOWN]


class Memory(LocalFiles):
    """Files that are kept in a dictionary."""

    def __init__(self) -> None:
        super().__init__(Path("/nowhere"))
        self.data: dict[str, bytes] = {}

    def read(self, name: str, offset: int = 0) -> bytes | None:
        data = self.data.get(name)
        return None if data is None else data[offset:]

    def names(self, folder: str) -> list[str]:
        return sorted(name.removeprefix(f"{folder}/") for name in self.data if name.startswith(f"{folder}/"))

    def create(self, name: str, data: bytes) -> bool:
        return self.data.setdefault(name, data) is data

    def replace(self, name: str, data: bytes) -> None:
        self.data[name] = data


READERS: dict[str, tuple[str, bytes, Callable[[LocalFiles], object]]] = {
    "run": ("run.json", RUN, lambda files: RunDirectory(files).read_run()),
    "lease": (SHOWN, lease(), read_lease),
    "journal": ("journal/000001.json", JOURNAL, lambda files: Journal(files).read_all()),
    "origin": ("checkpoint.json", ORIGIN, read_origin),
    "metrics": ("metrics.jsonl", METRICS + b"\n", lambda files: RunDirectory(files).metrics()),
    "events": ("events.jsonl", EVENT + b"\n", lambda files: LineReader(files, "events").poll()),
    "world": ("worlds/000001.json", b'{"generation": 1}', lambda files: RunDirectory(files).read_worlds()),
}
"""By a word: the file, what may stand in it, and who reads it."""


def told(name: str, data: bytes, read: Callable[[LocalFiles], object]) -> str:
    """What is wrong with it; "" if nothing."""
    files = Memory()
    files.data[name] = data
    try:
        read(files)
    except StoreError as error:
        problem = str(error)
        assert problem.startswith(files.where(name.partition(".")[0]))
        assert problem.isprintable() and len(problem) < 1000
        return problem
    return ""


@pytest.mark.parametrize("file", READERS)
def test_what_is_written_is_read(file: str) -> None:
    assert told(*READERS[file]) == ""


RAW = {
    "nothing": b"",
    "half": b'{"format": 1',
    "deep": b"[" * 100_000,
    "deep and whole": b'{"format": 1, "step": 1, "x": ' + b"[" * 900 + b"]" * 900 + b"}",
    "just too deep": b'{"format": 1, "step": 1, "x": ' + b"[" * MAX_DEPTH + b"]" * MAX_DEPTH + b"}",
    "many digits": b'{"format": 1, "step": 1' + b"0" * 5000 + b"}",
    "a list": b"[1]",
    "not UTF-8": b'{"format": 1, "step": "\xff"}',
}


@pytest.mark.parametrize("lie", RAW)
@pytest.mark.parametrize("file", READERS)
def test_what_is_no_json_or_none_to_be_read_is_named(file: str, lie: str) -> None:
    name, _, read = READERS[file]
    lines = name.endswith(".jsonl")
    if lines and lie == "nothing":
        return
    assert told(name, RAW[lie] + b"\n" * lines, read)


STRANGE: list[Any] = [
    None, True, 0, 1, -1, 2**62 + 1, 10**400, 10**4299, -(10**4299), 1.5, 1e300, float("nan"), float("inf"), "", "nan",
    "x" * 5000, "a\nb", "\x1b[31m", "\ud800", [], {}, [1] * 5000, [[]], {"x" * 5000: 1}, {"type": "x" * 5000},
    {"type": [[[]]]}, {"step": {}}, {"a\nb": "c"},
]  # fmt: skip


@settings(max_examples=400)
@given(data=st.data())
def test_whatever_stands_in_a_small_file_is_read_or_told_in_one_short_line(data: st.DataObject) -> None:
    name, sound, read = READERS[data.draw(st.sampled_from(sorted(READERS)))]
    values = json.loads(sound)
    for _ in range(data.draw(st.integers(1, 3))):
        container, key = data.draw(st.sampled_from([*places(values), (values, "x" * 2000), (values, "n\nl")]))
        if data.draw(st.booleans()) or not isinstance(container, dict):
            container[key] = deepcopy(data.draw(st.sampled_from(STRANGE)))
        else:
            container.pop(key, None)
    told(name, json.dumps(values).encode() + b"\n", read)


@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_no_run_that_is_made_up_crashes_the_commands(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, data: st.DataObject
) -> None:
    files = LocalFiles(tmp_path)
    if not files.folders("checkpoints"):
        save(files, make_state(0), 1)
    for name, sound in (("run.json", RUN), ("metrics.jsonl", METRICS), ("events.jsonl", EVENT)):
        values = json.loads(sound)
        for key in data.draw(st.lists(st.sampled_from([*values, "x"]), max_size=2)):
            values[key] = data.draw(st.sampled_from(STRANGE))
        files.replace(name, json.dumps(values).encode() + b"\n")
    for command in ("status", "status --json", "checkpoint ls", "checkpoint ls --json"):
        monkeypatch.setattr(sys, "argv", ["evenkeel", *shlex.split(command), str(tmp_path)])
        with pytest.raises(SystemExit) as end:
            main()
        err = capfd.readouterr().err
        assert end.value.code in (0, None) if not err else end.value.code == 2
        assert not err or err.startswith(f"evenkeel: {tmp_path}")
        assert len(err.splitlines()) <= 1 and len(err) < 1000


def test_depth_is_counted_in_lists_and_objects() -> None:
    at_most = '{"x":' * (MAX_DEPTH - 1) + "[1]" + "}" * (MAX_DEPTH - 1)
    assert json.dumps(parse_json(at_most), separators=(",", ":")) == at_most
    with pytest.raises(ValueError, match=r"^nested too deeply$"):
        parse_json(f"[{at_most}]")


def test_short_is_one_line() -> None:
    assert short("a\n b\t c") == "a b c"
    assert short("x" * 400) == "x" * 297 + "..."
    assert short([1] * 40, 10) == "[1, 1, ..."
    assert short("\x1b[31m \ud800 \u00e9") == r"\x1b[31m \ud800 " + "\u00e9"


def test_a_record_that_a_run_wrote_is_read_back(tmp_path: Path) -> None:
    directory = RunDirectory(LocalFiles(tmp_path))
    record = RunRecord("test", "failed", 1.5, 2.5, 3.5, "why", "", {"torch": "2.13.0"})
    directory.write_run(record)
    assert directory.read_run() == record


def test_a_config_that_is_no_text_is_named(tmp_path: Path) -> None:
    files = LocalFiles(tmp_path)
    files.replace("config.yaml", b"run: {name: \xff}\n")
    with pytest.raises(StoreError, match=r"config\.yaml: is not a text in UTF-8$"):
        RunDirectory(files).read_config()


def test_files_beside_the_worlds_are_no_worlds(tmp_path: Path) -> None:
    files = LocalFiles(tmp_path)
    files.replace("worlds/000003.json", b"{}")
    files.replace("worlds/notes.json", b"{}")
    assert RunDirectory(files).generations() == [3]
