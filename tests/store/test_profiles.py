"""profile.json: read back as written, and whatever else lies there is named."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from evenkeel.plan.hardware import Link
from evenkeel.plan.workload import LayerTime
from evenkeel.store.errors import StoreError
from evenkeel.store.profiles import DeviceRecord, Key, LinkRecord, ProfileRecord, TimesRecord
from evenkeel.store.run_directory import RunDirectory

KEY = Key("decoder", "bf16", 4, ("embed", "head"), "00ff")
RECORD = ProfileRecord(
    KEY,
    (DeviceRecord("A100", 80 * 10**9), DeviceRecord("H100", 80 * 10**9)),
    (
        TimesRecord("A100", 1, (2e-3, 3e-3), (4e-3, 5e-3)),
        TimesRecord("H100", 1, (1e-3, 2e-3), (2e-3, 3e-3)),
        TimesRecord("H100", 2, (1e-3, 1e-3), (1e-3, 2e-3)),
    ),
    (LinkRecord(("A100", "H100"), "between", 1e10, 2e-5), LinkRecord(("H100", "H100"), "inside", 1e11, 1e-6)),
    (100, 2**40),
    (50, 0),
    1.8e9,
    11.5,
    {"torch": "2.13.0"},
)


@pytest.fixture
def directory(tmp_path: Path) -> RunDirectory:
    directory = RunDirectory.of(str(tmp_path), "first")
    directory.write_profile(RECORD)
    return directory


def test_it_reads_back_as_it_was_written(directory: RunDirectory) -> None:
    assert directory.read_profile() == RECORD
    assert not directory.exists()  # a profile makes no run


def test_without_one_there_is_none(tmp_path: Path) -> None:
    assert RunDirectory.of(str(tmp_path), "none").read_profile() is None


def test_the_planner_gets_times_and_links_by_kind() -> None:
    profile = RECORD.profile
    assert profile.layers[("H100", 2)] == (LayerTime(1e-3, 1e-3), LayerTime(1e-3, 2e-3))
    assert profile.links[("A100", "H100", "between")] == Link(1e10, 2e-5)
    assert profile.links[("H100", "H100", "inside")] == Link(1e11, 1e-6)
    assert profile.kept_bytes == (100, 2**40)
    assert RECORD.degrees() == {1}


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({}, ""),
        ({"model": "own:model"}, "it is of model own:model, not decoder"),
        ({"precision": "fp32"}, "it is of precision fp32, not bf16"),
        ({"micro_batch": 8}, "it is of micro-batch 8, not 4"),
        ({"layers": ("a", "b", "c")}, "it is of another model, of 3 layers, not 2"),
        ({"fingerprint": "0000"}, "the model, or what it is given, has changed since"),
    ],
)
def test_what_makes_it_another_is_said(changes: dict[str, Any], says: str) -> None:
    assert KEY.difference(replace(KEY, **changes)) == says


def changed(directory: RunDirectory, *path: Any, value: Any) -> str:
    """What is said where this value stands at this place."""
    file = Path(directory.url) / "profile.json"
    values: Any = json.loads(file.read_text())
    inner = values
    for name in path[:-1]:
        inner = inner[name]
    inner[path[-1]] = value
    file.write_text(json.dumps(values))
    with pytest.raises(StoreError) as caught:
        directory.read_profile()
    text = str(caught.value)
    assert str(file) in text and "\n" not in text and len(text) < 600
    return text


@pytest.mark.parametrize(
    ("path", "value", "says"),
    [
        (("format",), 2, "has format 2; this evenkeel reads up to 1"),
        (("format",), "x", "no format version"),
        (("times", 0, "forward_s", 1), -1e-3, "a layer takes no -0.001 s"),
        (("times", 0, "forward_s", 1), "nan", "a layer takes no nan s"),
        (("times", 0, "forward_s", 1), "inf", "a layer takes no inf s"),
        (("times", 0, "backward_s"), [1.0], "1 values for 2 layers"),
        (("times", 0, "tensor"), 0, "TP degree 0"),
        (("times", 0, "tensor"), 10**400, "TP degree"),
        (("times", 0, "kind"), "H100", "there twice"),
        (("times", 0, "kind"), "B200", "not among the devices"),
        (("devices", 0, "kind"), "", "1 to 200 characters"),
        (("devices", 0, "kind"), "H100", "there twice"),
        (("devices", 0, "memory"), -1, "no number of bytes"),
        (("links", 0, "bytes_per_s"), 0.0, "no link has 0.0 bytes/s"),
        (("links", 0, "latency_s"), -1.0, "a latency of -1.0 s"),
        (("links", 0, "kinds"), ["H100", "A100"], "alphabetical"),
        (("links", 0, "where"), "beside", "neither inside nor between"),
        (("kept_bytes", 0), -5, "numbers of bytes"),
        (("kept_bytes", 0), 1.5, "int"),
        (("time",), 1e300, "its time is none"),
        (("key", "layers"), "embed", "a list expected"),
        (("key", "more"), 1, "has no field 'more'"),
        (("key",), [[]] * 10**5, "Key"),
    ],
)
def test_what_is_no_profile_is_named(directory: RunDirectory, path: Any, value: Any, says: str) -> None:
    assert says in changed(directory, *path, value=value)


@pytest.mark.parametrize("data", [b"", b"[]", b"{", b"\xff\xfe", b"[" * 10**6])
def test_what_is_no_json_object_is_named(directory: RunDirectory, data: bytes) -> None:
    (Path(directory.url) / "profile.json").write_bytes(data)
    with pytest.raises(StoreError, match=r"profile\.json"):
        directory.read_profile()
