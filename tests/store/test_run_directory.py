"""The run directory: names and fields that tools outside rely on."""

import errno
import json
import os
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from evenkeel.core.ids import INITIAL, NodeId, Version, WorkerId
from evenkeel.core.layout import Layout, Pipeline, Stage, WorkerInfo
from evenkeel.core.world import World
from evenkeel.store.errors import StoreError
from evenkeel.store.final import FinalWriter, TensorSpec, header
from evenkeel.store.retry import Trouble
from evenkeel.store.run_directory import RunDirectory, RunRecord, world_record

pytestmark = pytest.mark.stores("moto", "rgw")


@pytest.fixture
def run(url: str) -> RunDirectory:
    return RunDirectory.of(url, "first")


def test_a_run_is_found_by_its_record(run: RunDirectory, url: str) -> None:
    assert not run.exists()
    assert run.read_run() is None
    record = RunRecord("first", "running", 1.5, 2.5, versions={"torch": "2.13.0"})
    run.write_run(record)
    assert run.exists()
    assert RunDirectory.at(f"{url}/first").read_run() == record
    written = json.loads(run.files.read("run.json") or b"")
    assert (written["format"], written["status"], written["ended"]) == (1, "running", None)


def test_a_status_that_does_not_exist_is_refused() -> None:
    with pytest.raises(ValueError, match="status 'done' is not one of starting"):
        RunRecord("first", "done", 0.0, 0.0)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"format": 9}', "has format 9"),
        ('{"format": 1}', "damaged"),
        ("{", "not a JSON object"),
        ("[1]", "not a JSON object"),
    ],
)
def test_a_damaged_or_newer_record_is_refused_by_name(run: RunDirectory, text: str, said: str) -> None:
    run.files.replace("run.json", text.encode())
    with pytest.raises(StoreError, match=rf"run\.json: {said}"):
        run.read_run()


def test_config(run: RunDirectory) -> None:
    assert run.read_config() is None
    run.write_config("train: {}\n")
    assert run.read_config() == "train: {}\n"


def test_readers_take_the_last_line_of_a_step(run: RunDirectory) -> None:
    for step, generation in ((1, 1), (2, 1), (3, 1), (2, 2), (3, 2)):
        run.append_metrics({"step": step, "generation": generation})
    run.append_event({"event": "incident"})
    run.close()
    assert [(m["step"], m["generation"]) for m in run.metrics()] == [(1, 1), (2, 2), (3, 2)]
    assert run.events() == [{"event": "incident"}]
    assert len(run.follow("metrics").poll()) == 5


def test_metrics_are_those_of_the_line_that_the_run_is_on(run: RunDirectory) -> None:
    """Back to step 2, and later on from step 4 of the line that was given up by that."""
    for step, generation in ((1, 1), (2, 1), (3, 2), (4, 2), (5, 2), (3, 3), (3, 3), (4, 3), (5, 4)):
        run.append_metrics({"step": step, "generation": generation})
    run.close()
    steps = [(1, 1), (2, 1), (3, 2), (4, 2), (5, 4)]

    def shown() -> list[tuple[int, int]]:
        return [(m["step"], m["generation"]) for m in run.metrics()]

    assert shown() == [(1, 1), (2, 1), (3, 3), (4, 3), (5, 4)]  # without the worlds, as an earlier evenkeel has it
    for generation, base in ((1, Version(0, 0)), (2, Version(2, 1)), (3, Version(2, 1)), (4, Version(4, 2))):
        run.write_world(world_record(world_of(generation, base), [], time=1.0))
    assert shown() == steps
    run.append_metrics({"step": 1, "generation": 5})
    run.close()
    run.write_world(world_record(world_of(5, INITIAL), [], time=1.0))
    assert shown() == [(1, 5)]


def test_worlds_that_lie_about_where_they_began_do_no_harm(run: RunDirectory) -> None:
    for step, generation in ((1, 1), (2, 1), (2, 2), (3, 3)):
        run.append_metrics({"step": step, "generation": generation})
    run.close()
    for lie in ({"base_step": 2, "base_generation": 3}, {"base_step": "2", "base_generation": 2}, {"base_step": 2}):
        run.write_world({**world_record(world_of(3, Version(2, 2)), [], time=1.0), **lie})
        assert [m["step"] for m in run.metrics()][-1] == 3


def world_of(generation: int, base: Version) -> World:
    layout = Layout((Pipeline((Stage(0, 2, (WorkerId("w0"),)),), 0, 1),))
    return World(generation, layout, base, (worker("w0"),), (), (), 90, "start", "")


def worker(name: str) -> WorkerInfo:
    return WorkerInfo(WorkerId(name), NodeId("n0"), pid=100 + int(name[1:]))


def test_worlds_are_written_by_generation(run: RunDirectory) -> None:
    ids = [WorkerId(f"w{i}") for i in range(3)]
    stages = (Stage(0, 2, (ids[0],)), Stage(2, 5, (ids[1],)))
    layout = Layout((Pipeline(stages, 0, 5), Pipeline((Stage(0, 5, (ids[2],)),), 5, 8)))
    members = tuple(worker(i) for i in ids)
    world = World(7, layout, INITIAL, members, (), (), 90, "start", "3 workers")
    run.write_world(world_record(world, [worker("w3")], time=12.25))
    (record,) = run.read_worlds()
    assert run.files.names("worlds") == ["000007.json"]
    assert (record["generation"], record["cause"], record["reason"], record["time"]) == (7, "start", "3 workers", 12.25)
    assert record["spares"] == [{"worker_id": "w3", "node_id": "n0", "pid": 103}]
    wanted = {"worker_id", "node_id", "pid", "device", "rank", "pipeline", "stage", "tp"}
    assert all(wanted <= set(m) for m in record["members"])
    places = [(m["worker_id"], m["rank"], m["pipeline"], m["stage"], m["tp"]) for m in record["members"]]
    assert places == [("w0", 0, 0, 0, 0), ("w1", 1, 0, 1, 0), ("w2", 2, 1, 0, 0)]
    assert record["layout"]["pipelines"][1] == {
        "micro_batches": [5, 8],
        "stages": [{"layers": [0, 5], "members": ["w2"]}],
    }


def test_of_many_claims_of_a_fault_one_holds(run: RunDirectory, url: str) -> None:
    assert not run.fault_fired("step3-commit-rank1-kill-1")
    assert run.fault_times() == []
    began = time.time()
    claims: list[bool] = []
    barrier = threading.Barrier(4)

    def claim() -> None:
        barrier.wait()
        claims.append(RunDirectory.of(url, "first").claim_fault("step3-commit-rank1-kill-1"))

    threads = [threading.Thread(target=claim) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(claims) == [False, False, False, True]
    assert run.fault_fired("step3-commit-rank1-kill-1")
    assert run.claim_fault("step3-commit-rank1-kill-2")
    first, second = run.fault_times()
    assert began - 1e-6 <= first <= second <= time.time() + 1e-6
    assert run.files.create("faults/step4-commit-rank1-kill-1", b"b9e1858403cb8c04b65f844f07cc7a7e")  # does not tell
    assert run.fault_times() == [first, second]


def test_writable_or_one_line_that_says_why_not(run: RunDirectory, tmp_path: Path) -> None:
    run.check_writable()
    assert run.files.names("") == []
    (tmp_path / "plain").write_text("")
    with pytest.raises(StoreError, match="Not a directory"):
        RunDirectory.of(str(tmp_path / "plain"), "x").check_writable()
    with pytest.raises(StoreError):
        RunDirectory.of("/proc", "x").check_writable()


SPECS = (TensorSpec("a.weight", "F32", (3, 2)), TensorSpec("scalar", "F64", ()), TensorSpec("empty", "F32", (0, 4)),
         TensorSpec("b", "F32", (5,)))  # fmt: skip


def write_model(run: RunDirectory) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    arrays = {s.name: rng.normal(size=s.shape).astype({"F32": "<f4", "F64": "<f8"}[s.dtype]) for s in SPECS}
    with run.final(SPECS, {"layers": 2}) as writer:
        for name, array in arrays.items():
            data = array.tobytes()
            for at in range(0, len(data), 7):
                writer.write(name, data[at : at + 7])
    return arrays


def test_the_final_model_is_a_safetensors_file(run: RunDirectory, tmp_path: Path) -> None:
    arrays = write_model(run)
    (tmp_path / "copy.safetensors").write_bytes(run.files.read("final/model.safetensors") or b"")
    loaded = load_file(tmp_path / "copy.safetensors")
    assert set(loaded) == set(arrays)
    for name, array in arrays.items():
        np.testing.assert_array_equal(loaded[name], array)
    assert json.loads(run.files.read("final/config.json") or b"") == {"layers": 2}


def test_a_final_model_that_is_not_complete_does_not_appear(tmp_path: Path) -> None:
    run = RunDirectory.of(str(tmp_path), "first")
    with pytest.raises(ValueError, match="4 bytes from tensor b on"), run.final(SPECS, {}) as writer:
        _write_all(writer, {"a.weight": 24, "scalar": 8, "b": 16})
    assert run.files.names("final") == ["config.json"]


def _write_all(writer: FinalWriter, sizes: dict[str, int]) -> None:
    for name, size in sizes.items():
        writer.write(name, bytes(size))


@pytest.mark.parametrize(
    ("sizes", "said"),
    [
        ({"scalar": 8}, "scalar is written where a.weight comes next"),
        ({"a.weight": 25}, "a.weight has 24 bytes, 25 were written"),
        ({"a.weight": 24, "scalar": 8, "b": 20, "c": 1}, "c is written where nothing comes next"),
    ],
)
def test_wrong_bytes_are_refused(sizes: dict[str, int], said: str) -> None:
    class Ignore:
        def write(self, data: bytes | memoryview) -> None:
            pass

    with pytest.raises(ValueError, match=said):
        _write_all(FinalWriter(Ignore(), SPECS), sizes)


def test_the_data_begins_aligned_and_specs_are_checked() -> None:
    assert len(header(SPECS)) % 8 == 0
    with pytest.raises(ValueError, match="two tensors have one name"):
        header([SPECS[0], SPECS[0]])
    with pytest.raises(ValueError, match="x has dtype I3; expected one of F64"):
        header([TensorSpec("x", "I3", ())])


@pytest.mark.parametrize(
    ("number", "said"),
    [(errno.ENOSPC, "No space left on device; free some"), (errno.ESTALE, "Stale file handle")],
)
def test_lines_wait_on_a_full_disk_and_for_a_server_of_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, said: str
) -> None:
    def full(fd: int, data: bytes) -> int:
        raise OSError(number, os.strerror(number))

    def wait(seconds: float) -> bool:
        monkeypatch.setattr(os, "write", whole)
        return False

    told: list[Trouble] = []
    run = RunDirectory.at(str(tmp_path)).patient(told.append, wait)
    whole = os.write
    monkeypatch.setattr(os, "write", full)
    run.append_event({"a": 1})
    assert run.events() == [{"a": 1}]
    (trouble,) = told
    assert str(trouble.error).startswith(f"{tmp_path}/events.jsonl: {said}")
