"""That what `checkpoint` and `memory` measure is really measured: real workers and a real disk, all of it tiny."""

import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "jobs"))

from bench import durable, s3, saved
from bench.s3 import Store
from bench.sides import Side, static, torchrun
from bench.work import Steps, Work, check_same_work

TINY = durable.Size({"d_model": 32, "layers": 2, "heads": 4, "kv_heads": 2, "seq_len": 16}, steps=30, save_every=4)


def run(side: Side, folder: Path) -> Steps:
    (folder / side.name).mkdir()
    return side.run(folder / side.name)


def test_a_checkpoint_is_measured_inside_the_workers(tmp_path: Path) -> None:
    work = TINY.work(2)
    steps = run(static(work, "ours", (saved.FLOOR, saved.PLAIN, saved.MEMORY)), tmp_path)
    assert saved.stall_ratio(steps) > 0.5
    assert saved.cpu_ratio(steps) > 0.5
    parts = [line for line in saved.writes(steps) if line["step"] == 4]
    assert {line["worker"] for line in parts} == {"w0000", "w0001"}
    assert all(size > 100 * 2**20 for size in saved.peaks(steps).values()), "torch alone takes more"
    assert not (steps.run / "checkpoints").exists() if steps.run else True, "it would fill the disk"


def test_a_checkpoint_is_written_beside_plain_writing(tmp_path: Path) -> None:
    place = Store("disk", str(tmp_path / "store"), {})
    found = durable.write_pair(TINY.work(2), lambda _: nullcontext(place), tmp_path, 0)
    assert found.ours_s > 0 < found.plain_s
    assert found.bytes > 100_000


@pytest.mark.soak
def test_parts_go_to_an_s3_server_while_training_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Here to moto's, which is quick."""
    sys.path.append(str(s3.SERVERS))
    from servers import BUCKET, Moto

    server = Moto(tmp_path)
    try:
        store = s3.Store("moto", f"s3://{BUCKET}/bench", server.s3.environment)
        monkeypatch.setattr(durable, "s3_server", lambda folder: nullcontext(store))
        # So many steps that the part is written, and has its line, long before the run is over and its process ended.
        steps = run(durable.uploader(replace(TINY.work(1), save_every=20, steps=200), "ours"), tmp_path)
        objects = server.s3.client.list_objects_v2(Bucket=BUCKET, Prefix="bench/run/checkpoints/")["Contents"]
    finally:
        server.stop()
    part, written = saved.writes(steps)[0], objects[0]
    assert written["Key"] == "bench/run/checkpoints/step-00000020/g1-w0000.safetensors"
    assert (part["step"], part["worker"]) == (20, "w0000")
    assert 0 < part["bytes"] < written["Size"] < 1.5 * part["bytes"], "all of it, and a header"


@pytest.mark.soak
@pytest.mark.parametrize("how", ["dcp", "torch"])
def test_a_peer_that_saves_does_the_same_work(how: str, tmp_path: Path) -> None:
    work = TINY.work(2)
    ours = run(static(work, "ours", (saved.WRITES,)), tmp_path)
    theirs = run(torchrun("theirs", "save_ddp.py", work, how), tmp_path)
    assert check_same_work(ours, theirs, how) < 1e-4
    assert saved.stall_s(theirs) > 0


@pytest.mark.soak
def test_torchs_zero1_does_the_same_work(tmp_path: Path) -> None:
    work = replace(Work(steps=14, data=2, copies=1), model=TINY.model)
    assert check_same_work(run(static(work, "ours"), tmp_path), run(_zero1(work), tmp_path), "ZeRO-1") < 1e-4


def _zero1(work: Work) -> Side:
    return torchrun("theirs", "train_zero1.py", work)
