"""The benchmarks `checkpoint` and `memory`: what is made of what was measured inside, and of what could not be."""

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from math import prod
from pathlib import Path
from typing import Any

import pytest
from xxhash import xxh3_64_hexdigest

JOBS = Path(__file__).resolve().parents[2] / "jobs"
sys.path.insert(0, str(JOBS))

from bench import durable, lab, s3, saved, sides  # noqa: E402
from bench.plain import write_plainly  # noqa: E402
from bench.process import BenchError  # noqa: E402
from bench.work import Steps, Work  # noqa: E402

Line = Mapping[str, Any]


def part(step: int, worker: str = "w0", **values: float) -> Line:
    """A part of 100 bytes, copied in 0.3 s at unix time 1000 + step and then written in 2 s."""
    at = 1000.0 + step
    times = {
        "copied_at": at + 0.3,
        "began": at + 0.3,
        "write_began": at + 0.3,
        "write_ended": at + 2.3,
        "ended": at + 2.3,
    }
    costs = {"copy_s": 0.3, "floor_s": 0.2, "floors_s": 0.5, "copy_cpu_s": 0.3, "write_cpu_s": 0.8, "plain_cpu_s": 1.0}
    return {"worker": worker, "step": step, "bytes": 100, **costs, **times, **values}


def steps_with(*lines: Line, count: int = 34, ends: Mapping[int, float] | None = None) -> Steps:
    """Steps of 1 s, from unix time 1000 on."""
    ends = ends or {s: 1000.0 + s for s in range(1, count + 1)}
    return Steps(1000.0, ends, {s: 5.0 / s for s in ends}, inside=lines)


@pytest.fixture
def a_lab(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> lab.Lab:
    monkeypatch.setattr(lab, "wait_quiet", lambda _: 0.0)
    return lab.Lab(tmp_path)


# ------------------------------------------------------------ what is made of it


def test_the_slowest_worker_decides_how_long_a_checkpoint_holds_up_the_training() -> None:
    steps = steps_with(part(16), part(16, "w1", copy_s=0.5, floor_s=0.4), part(24, copy_s=0.3, floor_s=0.3))
    assert saved.stall_ratio(steps) == pytest.approx((0.5 / 0.4 + 0.3 / 0.3) / 2)
    assert saved.stall_s(steps) == pytest.approx(0.4)
    assert saved.floor_s(steps) == pytest.approx(0.35)


def test_checkpoints_of_the_warm_up_and_of_the_last_step_do_not_count() -> None:
    odd = {"copy_s": 9.0}
    first = {key: value for key, value in part(12, **odd).items() if key != "floor_s"}
    assert saved.stall_ratio(steps_with(part(8, **odd), first, part(16), part(34, **odd))) == pytest.approx(1.5)
    with pytest.raises(BenchError, match="no checkpoint was made after step 10 with all of: floor_s"):
        saved.stall_ratio(steps_with(part(8), first, part(34)))


def test_cpu_time_counts_from_the_copy_to_the_last_byte() -> None:
    assert saved.cpu_ratio(steps_with(part(16))) == pytest.approx(1.1)
    with pytest.raises(BenchError, match="plain_cpu_s"):
        saved.cpu_ratio(steps_with({k: v for k, v in part(16).items() if k != "plain_cpu_s"}))


def test_cpu_time_is_compared_in_both_orders_alike() -> None:
    """Whoever writes second finds it easier: three to one of an order must not decide."""
    first = [part(step, write_cpu_s=1.7) for step in (12, 16, 20)]
    assert saved.cpu_ratio(steps_with(*first, part(24, write_cpu_s=0.2, plain_first=True))) == pytest.approx(1.0)


def ends_of(durations: Mapping[int, float]) -> dict[int, float]:
    """Steps of 1 s but for these."""
    ends, now = {}, 1000.0
    for step in range(1, 35):
        now += durations.get(step, 1.0)
        ends[step] = now
    return ends


def test_only_steps_wholly_within_the_writing_are_slowed_by_it() -> None:
    """Step 17 begins with a copy of 0.3 s, and the writing ends within step 19."""
    ends = ends_of({17: 0.3 + 1.1, 18: 1.2, 19: 1.05})
    steps = steps_with(part(16, write_ended=1018.9, ended=1018.9), ends=ends)
    assert saved.slowdown(steps) == pytest.approx(1.15)


def test_writing_that_is_over_within_a_step_says_nothing_of_steps() -> None:
    with pytest.raises(BenchError, match="no whole step during the writing of a part: 0 during"):
        saved.slowdown(steps_with(part(16, write_ended=1016.5, ended=1016.5)))
    with pytest.raises(BenchError, match="no part of a checkpoint was written"):
        saved.slowdown(steps_with())


def test_the_step_after_a_checkpoint_is_told_beside_the_copy() -> None:
    """0.5 s of it are the copies made only for the comparison; what is written plainly first does not count."""
    ends = ends_of({17: 1.7, 25: 9.0})
    assert saved.late_s(steps_with(part(16), part(24, plain_first=True), ends=ends)) == pytest.approx(0.2)
    always = steps_with(part(16, began=0.0, ended=9999.0), ends=ends_of({17: 1.7}))
    assert saved.late_s(always) is None


def test_memory_is_that_of_the_worst_worker_at_its_worst() -> None:
    def peaks(**bytes_of: Sequence[int]) -> list[Line]:
        return [{"worker": w, "peak_bytes": b} for w, found in bytes_of.items() for b in found]

    without = steps_with(*peaks(w0=[900, 1000], w1=[1000]))
    saving = steps_with(part(16), part(16, "w1"), *peaks(w0=[1000, 1102], w1=[1104, 900]))
    assert saved.extra_memory(saving, without) == pytest.approx(1.04)
    with pytest.raises(BenchError, match="how much memory"):
        saved.extra_memory(saving, steps_with())
    with pytest.raises(BenchError, match="no part"):
        saved.extra_memory(steps_with(*peaks(w0=[1, 2], w1=[3])), without)


def test_the_plain_way_writes_all_bytes_with_their_checksum(tmp_path: Path) -> None:
    data = bytes(range(256)) * 9000
    found = write_plainly(tmp_path / "plain", [memoryview(data)[:5], memoryview(data)[5:]])
    assert (tmp_path / "plain").read_bytes() == data
    assert found == xxh3_64_hexdigest(data)


# ------------------------------------------------------------ the benchmarks


STORE = s3.Store("a store", "s3://x/y", {"KEY": "value"})


@pytest.fixture
def fake_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Our copy takes 1.1 of a plain one, a step during the writing 1.02 of others; each peer stands still for 2 s."""

    def ours(
        work: Work,
        name: str = "engine alone",
        measures: Sequence[str] = (),
        environment: Mapping[str, str] | None = None,
    ) -> sides.Side:
        assert (work.storage, environment) in (("", None), (STORE.url, STORE.environment))
        base = 1100 if "writes" in measures else 1000
        memory = [{"worker": w, "peak_bytes": base} for w in ("w0", "w1")] if "memory" in measures else []
        parts = [part(16, w, copy_s=0.22, write_ended=1018.5, ended=1018.5) for w in ("w0", "w1")]
        ends = ends_of({17: 0.3 + 1.02, 18: 1.02})
        return sides.Side(name, 1, lambda _: steps_with(*memory, *(parts if work.save_every else ()), ends=ends))

    def peer(name: str) -> sides.Side:
        lines = [{"worker": "0", "step": 16, "copy_s": 2.0}]
        return sides.Side(name, 1, lambda _: steps_with(*lines, ends={s: 1000 + 1.25 * s for s in range(1, 35)}))

    monkeypatch.setattr(durable, "static", ours)
    monkeypatch.setattr(durable, "s3_server", lambda folder: nullcontext(STORE))
    monkeypatch.setattr(durable, "torchrun", lambda name, script, work, *words: peer(name))
    monkeypatch.setattr(durable, "raytrain", lambda work, name, script: peer(name))
    pair = durable.Written("a disk", 1_000_000, 1.0, 0.95, 0.5, 0.4)
    monkeypatch.setattr(durable, "write_pair", lambda work, place, folder, number: pair)


@pytest.mark.usefixtures("fake_runs")
def test_a_checkpoint_is_measured_by_its_rows(a_lab: lab.Lab) -> None:
    result = durable.checkpoint(a_lab, None)
    values = {row.name: row.value for row in result.rows}
    assert values == pytest.approx(
        {"stall_ratio": 1.1, "cpu_ratio": 1.1, "step_while_uploading": 1.02, "local_write": 0.95, "s3_write": 0.95}
    )
    assert all(row.holds for row in result.rows)
    assert [len(row.runs) for row in result.rows] == [5, 5, 15, 15, 15]
    assert "DCP async_save: 2000 ms" in result.notes["stall_ratio"]
    assert "one memory copy: 200 ms" in result.notes["stall_ratio"]
    assert "1 MB/s to a disk" in result.notes["local_write"]
    assert all(result.what[row.name] for row in result.rows)


@pytest.mark.usefixtures("fake_runs")
def test_memory_is_measured_by_its_rows(a_lab: lab.Lab) -> None:
    result = durable.memory(a_lab, None)
    rows = {row.name: row for row in result.rows}
    assert {name: row.value for name, row in rows.items()} == pytest.approx(
        {"extra_host_memory": 1.0, "zero1_step": 1.25 / 1.0}, rel=0.02
    )
    assert [len(row.runs) for row in rows.values()] == [5, 15]
    assert all(row.holds for row in rows.values())


@pytest.mark.usefixtures("fake_runs")
def test_what_could_not_be_measured_is_null_and_says_why_and_the_rest_stands(
    a_lab: lab.Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where Ceph is not installed nothing else stands for it."""

    def pair(work: Work, place: durable.Place, folder: Path, number: int) -> durable.Written:
        with place(folder) as store:
            return durable.Written(store.name, 1, 1.0, 1.0, 1.0, 1.0)

    monkeypatch.setattr(durable, "write_pair", pair)
    monkeypatch.setattr(durable, "s3_server", s3.s3_server)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(durable, "raytrain", lambda work, name, script: sides.Side(name, 1, _broken))
    result = durable.checkpoint(a_lab, 1)
    rows = {row.name: row for row in result.rows}
    for name in ("s3_write", "step_while_uploading"):
        assert rows[name].value is None and not rows[name].holds
        assert "no S3 server: radosgw, " in result.notes[name]
        assert "get them with: apt-get install --no-install-recommends radosgw" in result.notes[name]
    assert rows["local_write"].value == 1.0
    assert rows["stall_ratio"].value == pytest.approx(1.1)
    assert "Ray Train report: exit status 1" in result.notes["stall_ratio"]


def _broken(_: Path) -> Steps:
    raise BenchError("exit status 1")


@pytest.mark.usefixtures("fake_runs")
def test_a_run_in_which_no_checkpoint_was_made_is_no_measurement(
    a_lab: lab.Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(durable, "static", lambda work, name, *_: sides.Side(name, 1, lambda _: steps_with()))
    result = durable.checkpoint(a_lab, 1)
    for name in ("stall_ratio", "cpu_ratio", "step_while_uploading"):
        (row,) = [row for row in result.rows if row.name == name]
        assert row.value is None
        assert "no " in result.notes[name]


# ------------------------------------------------------------ writing


def test_pairs_are_written_forwards_and_backwards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    orders = []

    def execute(command: list[str], folder: Path, variables: Mapping[str, str]) -> None:
        *_, url, out, name = command
        orders.append(name)
        assert (url, dict(variables)) == (STORE.url, {"KEY": "value"})
        took = {"s": 2.0, "cpu_s": 1.0} if name == "ours" else {"s": 1.0, "cpu_s": 0.5}
        Path(out).write_text(json.dumps({"bytes": 10, **took}))

    monkeypatch.setattr(durable, "execute", execute)
    for number in range(2):
        found = durable.write_pair(Work(), lambda _: nullcontext(STORE), tmp_path, number)
        assert found == durable.Written("a store", 10, 2.0, 1.0, 1.0, 0.5)
    assert orders == ["ours", "plain", "plain", "ours"]


def test_without_an_s3_server_it_is_said_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "servers", None)
    with pytest.raises(BenchError, match="servers is not installed; make setup"), s3.s3_server(tmp_path):
        pass


def test_a_measurement_that_fails_twice_is_given_up(a_lab: lab.Lab) -> None:
    tries = []

    def run(folder: Path, number: int) -> int:
        tries.append((number, folder.is_dir()))
        if len(tries) in (2, 4, 5):
            raise BenchError("nothing came")
        return number

    assert a_lab.repeat("a disk", 5, run) == [0, 1]
    assert tries == [(0, True), (1, True), (1, True), (2, True), (2, True)]
    assert a_lab.failures == {"a disk": "nothing came"}


# ------------------------------------------------------------ the work


def test_by_default_a_hundred_million_parameters_are_saved(tmp_path: Path) -> None:
    from evenkeel.config import load_config
    from evenkeel.engine.model import model_shape
    from evenkeel.runtime.job import make_model

    for workers in (1, 2):
        config = load_config([durable.LARGE.work(workers).write(tmp_path)])
        assert config.checkpoint.every_steps == durable.LARGE.save_every
        assert config.train.micro_batches >= workers
    shape = model_shape(make_model(config))
    assert sum(prod(p.shape) for layer in shape.layers for p in layer.params) == pytest.approx(100e6, rel=0.05)


def test_the_peers_have_a_script_each(monkeypatch: pytest.MonkeyPatch, a_lab: lab.Lab) -> None:
    scripts: list[str] = []

    def noted(name: str, script: str) -> sides.Side:
        scripts.append(script)
        return sides.Side(name, 1, _broken)

    monkeypatch.setattr(durable, "static", lambda work, name="engine alone", *_: sides.Side(name, 1, _broken))
    torchrun: Callable[..., sides.Side] = lambda name, script, work, *words: noted(name, script)  # noqa: E731
    monkeypatch.setattr(durable, "torchrun", torchrun)
    monkeypatch.setattr(durable, "raytrain", lambda work, name, script: noted(name, script))
    monkeypatch.setattr(durable, "write_pair", lambda work, place, folder, number: _broken(folder))
    monkeypatch.setattr(durable, "s3_server", lambda folder: nullcontext(STORE))
    results = [durable.checkpoint(a_lab, 1), durable.memory(a_lab, 1)]
    assert all(row.value is None for result in results for row in result.rows)
    assert all((JOBS / "peers" / script).is_file() for script in scripts)
    assert scripts == ["save_ddp.py", "save_ddp.py", "save_raytrain.py", "train_zero1.py"]
