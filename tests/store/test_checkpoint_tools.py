"""`evenkeel checkpoint` as a user sees it: what it prints, its exit statuses, and what it writes."""

import json
import re
import shlex
import shutil
import subprocess
import sys
import tracemalloc
import weakref
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoint_state import State, commit, load, same, save, write_parts
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from evenkeel.cli import main
from evenkeel.control import messages as m
from evenkeel.control.divergence import judge
from evenkeel.core.codec import dump
from evenkeel.core.ids import INITIAL, NodeId, Version, WorkerId
from evenkeel.core.layout import Layout, Pipeline, Stage, WorkerInfo
from evenkeel.core.vote import SLOTS, Difference, Vote
from evenkeel.core.world import World
from evenkeel.plan.state import KINDS
from evenkeel.store import manifest
from evenkeel.store.checkpoint_reader import Checkpoint
from evenkeel.store.checkpoints import Checkpoints
from evenkeel.store.errors import StoreError
from evenkeel.store.files import Files, LocalFiles, open_files
from evenkeel.store.journal import Journal
from evenkeel.store.run_directory import RunDirectory, RunRecord
from evenkeel.tools import describe, exporting, importing, plain
from evenkeel.tools.text import size_text

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Done:
    """What a command left."""

    status: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


Run = Callable[[str], Done]


@pytest.fixture
def evenkeel(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Run:
    """Runs a command line in this process, in which memory:// stays."""

    def run(line: str) -> Done:
        capfd.readouterr()
        monkeypatch.setattr(sys, "argv", ["evenkeel", *shlex.split(line)])
        with pytest.raises(SystemExit) as end:
            main()
        out, err = capfd.readouterr()
        assert isinstance(end.value.code, int | None)
        return Done(end.value.code or 0, out, err)

    return run


def make_state(seed: int = 0) -> State:
    """As a run has it: float32, AdamW's moments beside each parameter."""
    values = np.random.default_rng(seed)
    shapes = {"embed.weight": (11, 4), "blocks.0.bias": (5,), "blocks.0.weight": (5, 4), "scale": (), "none": (0, 3)}
    return {
        f"{kind}/{name}": values.standard_normal(shape).astype("float32")
        for kind in KINDS
        for name, shape in shapes.items()
    }


def weights(state: State) -> State:
    return {n.removeprefix("param/"): v for n, v in state.items() if n.startswith("param/")}


def opened(files: Files, step: int) -> Checkpoint:
    found = Checkpoints(files).open(step)
    assert found is not None
    return found


def flip(checkpoint: Checkpoint, at: int = -1) -> str:
    """One bit of one byte of the first file; returns its name."""
    assert isinstance(checkpoint.files, LocalFiles)
    name = checkpoint.manifest.files[0].name
    path = checkpoint.files.path(f"{checkpoint.folder}/{name}")
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)
    return name


# ---------------------------------------------------------------- ls


def test_ls_says_in_what_state_each_is(tmp_path: Path, evenkeel: Run) -> None:
    files = LocalFiles(tmp_path)
    save(files, make_state(), 10, generation=1)
    cut = save(files, make_state(), 20, generation=2)
    (tmp_path / cut.folder / cut.manifest.files[0].name).write_bytes(b"short")
    save(files, make_state(), 15, generation=3)
    files.replace("checkpoints/step-00000030/g3-w0001.safetensors", b"x" * 1234)
    files.replace("checkpoints/step-00000040/manifest.json", b"{}")
    directory = RunDirectory(files)
    for time, checkpoint in ((1.5, 15), (2.5, 20), (1700000000.25, 15)):  # after 20 the run went back
        event = {"event": "checkpoint_committed", "step": 17, "generation": 4, "checkpoint": checkpoint, "time": time}
        directory.append_event(event)
    directory.close()

    done = evenkeel(f"checkpoint ls {tmp_path} --json")
    rows = done.json["checkpoints"]
    assert done.status == 0
    assert [(r["step"], r["generation"], r["state"]) for r in rows] == [
        (30, 3, "half-written"),
        (15, 3, "complete"),
        (20, 2, "damaged"),
        (10, 1, "complete"),
        (40, None, "damaged"),
    ]
    assert [r["time"] for r in rows] == [None, 1700000000.25, 2.5, None, None]
    assert (rows[0]["bytes"], rows[0]["files"]) == (1234, 1)
    assert rows[1]["bytes"] == sum(f.size for f in opened(files, 15).manifest.files)
    assert f"{cut.manifest.files[0].name}: has 5 bytes" in rows[2]["why"]

    lines = evenkeel(f"checkpoint ls {tmp_path}").out.splitlines()
    assert lines[0].split() == ["step", "generation", "time", "size", "files", "state"]
    assert lines[1].split()[:6] == ["30", "3", "-", "1.23", "kB", "1"]
    assert lines[1].endswith("half-written: it has no manifest: it is being written, or its writer died")
    assert lines[4].endswith(" complete")
    column = lines[0].index("state")
    assert all(line[column - 1] == " " and line[column] != " " for line in lines)


def test_ls_on_any_store(files: Files, url: str, evenkeel: Run) -> None:
    save(files, make_state(), 10)
    assert [r["state"] for r in evenkeel(f"checkpoint ls {url} --json").json["checkpoints"]] == ["complete"]


def test_a_checkpoint_of_a_newer_format_does_not_hide_the_others(
    tmp_path: Path, evenkeel: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = LocalFiles(tmp_path)
    save(files, make_state(), 10)
    newer = save(files, make_state(), 20, generation=0)
    with monkeypatch.context() as of_the_future:
        of_the_future.setattr(manifest, "FORMAT", 99)
        files.replace(f"{newer.folder}/{manifest.NAME}", manifest.to_json(replace(newer.manifest, format=99)))
    rows = evenkeel(f"checkpoint ls {tmp_path} --json").json["checkpoints"]
    assert [(r["step"], r["state"]) for r in rows] == [(10, "complete"), (20, "unreadable")]
    assert "format 99" in rows[1]["why"]


def test_a_terminal_gets_colours_and_a_bar(tmp_path: Path, evenkeel: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    save(LocalFiles(tmp_path), make_state(), 10)
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert "\x1b[1m" in evenkeel(f"checkpoint ls {tmp_path}").out
    done = evenkeel(f"checkpoint verify {tmp_path}")
    assert done.out == "step 10: whole\n"
    assert "step 10" in done.err


def test_ls_of_a_run_without_checkpoints(tmp_path: Path, evenkeel: Run) -> None:
    RunDirectory.at(str(tmp_path)).write_run(RunRecord("first", "running", 1.0, 1.0))
    assert evenkeel(f"checkpoint ls {tmp_path}").out == f"{tmp_path} has no checkpoint yet\n"
    assert evenkeel(f"checkpoint ls {tmp_path} --json").json["checkpoints"] == []


@pytest.mark.parametrize("command", ["ls", "inspect", "verify", "export --to {0}/to --format safetensors"])
def test_no_run_is_one_line_and_2(tmp_path: Path, evenkeel: Run, command: str) -> None:
    done = evenkeel(f"checkpoint {command.format(tmp_path)} {tmp_path}/none")
    assert (done.status, done.out) == (2, "")
    assert done.err == f"evenkeel: {tmp_path}/none: no run here (there is neither run.json nor a folder checkpoints/)\n"


@pytest.mark.parametrize("command", ["inspect", "verify", "export --to {0}/to --format safetensors"])
def test_no_such_step_names_those_that_there_are(tmp_path: Path, evenkeel: Run, command: str) -> None:
    for step in (10, 20):
        save(LocalFiles(tmp_path), make_state(), step)
    done = evenkeel(f"checkpoint {command.format(tmp_path)} {tmp_path} --step 15")
    assert done.status == 2
    assert done.err == f"evenkeel: {tmp_path}: no complete checkpoint of step 15; there are those of steps 10, 20\n"


def test_ls_inspect_and_verify_import_no_torch(tmp_path: Path) -> None:
    save(LocalFiles(tmp_path), make_state(), 10)
    code = "import sys; from evenkeel.cli import main\ntry: main()\nfinally: sys.exit('torch' in sys.modules)"
    for command in ("ls", "inspect", "verify", f"export --to {tmp_path}/to --format safetensors"):
        words = [sys.executable, "-c", code, "checkpoint", *command.split(), str(tmp_path)]
        done = subprocess.run(words, capture_output=True, text=True, env={"PYTHONPATH": str(ROOT / "platform")})
        assert done.returncode == 0, (command, done.stderr)


# ---------------------------------------------------------------- inspect


def test_inspect_says_what_a_checkpoint_holds(tmp_path: Path, evenkeel: Run) -> None:
    found = save(LocalFiles(tmp_path), make_state(), 10, generation=3)
    save(LocalFiles(tmp_path), make_state(), 5, generation=3)
    record = evenkeel(f"checkpoint inspect {tmp_path} --json").json
    assert (record["step"], record["generation"], record["seed"], record["samples"]) == (10, 3, 7, 320)
    assert record["parameters"] == 44 + 5 + 20 + 1
    assert record["bytes"] == sum(f["bytes"] for f in record["files"])
    assert sum(f["slices"] for f in record["files"]) == sum(t["slices"] for t in record["tensors"])
    assert {t["name"]: (t["dtype"], t["shape"], t["bytes"]) for t in record["tensors"]} == {
        name: ("F32", list(value.shape), value.nbytes) for name, value in make_state().items()
    }
    assert record["config"] == {"run": {"name": "test"}}

    text = evenkeel(f"checkpoint inspect {tmp_path} --step 10").out
    assert text.startswith(f"checkpoint  {found.url}\nversion     step 10, generation 3; 320 samples used, seed 7\n")
    assert "holds       70 parameters in 15 tensors, " in text
    assert "  run.name: test\n" in text
    row = next(line for line in text.splitlines() if line.startswith("  embed.weight "))
    assert row.split()[1:5] == ["11", "x", "4", "F32"]


def test_the_picture_of_a_layout() -> None:
    names = iter(f"w{n:04d}" for n in range(1, 20))

    def stage(start: int, stop: int) -> Stage:
        return Stage(start, stop, (WorkerId(next(names)), WorkerId(next(names))))

    unequal = Layout(
        (
            Pipeline((stage(0, 2), stage(2, 6)), 0, 4),
            Pipeline((stage(0, 3), stage(3, 6)), 4, 7),
            Pipeline((stage(0, 6),), 7, 8),
        )
    )
    assert [line.rstrip() for line in describe.picture(unequal)] == [
        "layers     | 0:2         | 2:3 | 3:6         |",
        "pipeline 0 | w0001 w0002 | w0003 w0004       | micro-batches 0:4",
        "pipeline 1 | w0005 w0006       | w0007 w0008 | micro-batches 4:7",
        "pipeline 2 | w0009 w0010                     | micro-batches 7:8",
    ]
    alone = Layout((Pipeline((Stage(0, 1, (WorkerId("a-long-name"),)),), 0, 1),))
    assert [line.rstrip() for line in describe.picture(alone)] == [
        "layers     | 0:1         |",
        "pipeline 0 | a-long-name | micro-batches 0:1",
    ]


@pytest.mark.parametrize(
    ("size", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1 kB"), (12345, "12.3 kB"), (999_600, "1 MB"), (5e16, "50 PB")],
)
def test_sizes_in_words(size: float, text: str) -> None:
    assert size_text(size) == text


# ---------------------------------------------------------------- verify


def test_verify_of_whole_checkpoints(files: Files, url: str, evenkeel: Run) -> None:
    for step in (10, 20):
        save(files, make_state(), step)
    assert evenkeel(f"checkpoint verify {url}").out == "step 20: whole\nstep 10: whole\n"
    assert evenkeel(f"checkpoint verify {url} --step 10").out == "step 10: whole\n"


def test_verify_names_each_damage_and_ends_with_3(tmp_path: Path, evenkeel: Run) -> None:
    files = LocalFiles(tmp_path)
    save(files, make_state(), 5)
    one = save(files, make_state(), 10)
    name = flip(one)
    files.remove(f"{one.folder}/{one.manifest.files[1].name}")
    files.replace("checkpoints/step-00000020/manifest.json", b"[]")
    files.replace("checkpoints/step-00000030/g1-w0001.safetensors", b"half")
    done = evenkeel(f"checkpoint verify {tmp_path}")
    assert (done.status, done.err) == (3, "")
    size = one.manifest.file(name).size
    said = f"{one.url}/{name}: bytes {size // 64 * 64} to {size} are not what was written"
    assert f"step 10: 2 damaged\n  {said}\n" in done.out
    assert f"  {one.url}/{one.manifest.files[1].name}: missing\n" in done.out
    assert "step 20: 1 damaged\n" in done.out
    assert done.out.endswith("step 5: whole\n")
    as_json = evenkeel(f"checkpoint verify {tmp_path} --json")
    assert as_json.status == 3
    assert [(c["step"], len(c["damage"])) for c in as_json.json["checkpoints"]] == [(20, 1), (10, 2), (5, 0)]
    assert evenkeel(f"checkpoint verify {tmp_path} --step 5").status == 0
    assert evenkeel(f"checkpoint verify {tmp_path} --step 10").status == 3


def test_nothing_to_verify_is_bad_input(tmp_path: Path, evenkeel: Run) -> None:
    LocalFiles(tmp_path).replace("checkpoints/step-00000030/g1-w0001.safetensors", b"half")
    done = evenkeel(f"checkpoint verify {tmp_path}")
    assert (done.status, done.err) == (2, f"evenkeel: {tmp_path}: no complete checkpoint to verify\n")


# ---------------------------------------------------------------- export


def test_export_to_safetensors(tmp_path: Path, evenkeel: Run) -> None:
    state, to = make_state(), tmp_path / "to"
    save(LocalFiles(tmp_path), state, 10, generation=2)
    done = evenkeel(f"checkpoint export {tmp_path} --step 10 --to {to} --format safetensors --json")
    where = f"{tmp_path}/checkpoints/step-00000010"
    assert done.json == {"checkpoint": where, "step": 10, "to": str(to), "tensors": 15}
    assert same(load_file(to / "model.safetensors"), weights(state))
    moments = {name: value for name, value in state.items() if not name.startswith("param/")}
    assert same(load_file(to / "optimizer.safetensors"), moments)
    assert json.loads((to / "config.json").read_text()) == {"run": {"name": "test"}}
    assert json.loads((to / "checkpoint.json").read_text()) == {
        "format": 1, "step": 10, "generation": 2, "samples": 320, "seed": 7,
    }  # fmt: skip


def test_export_of_weights_only_of_the_newest(files: Files, url: str, evenkeel: Run) -> None:
    save(files, make_state(1), 10)
    save(files, make_state(2), 20)
    done = evenkeel(f"checkpoint export {url} --to {url}/exported --format safetensors --weights-only")
    assert done.out == f"step 20: 5 tensors in {open_files(url).where('exported')}\n"
    names = open_files(f"{url}/exported").names("")
    assert names == ["README.md", "checkpoint.json", "config.json", "model.safetensors"]


@pytest.mark.parametrize("most", [1, 40, 100])
def test_a_tensor_is_exported_in_blocks_of_rows(
    tmp_path: Path, evenkeel: Run, monkeypatch: pytest.MonkeyPatch, most: int
) -> None:
    monkeypatch.setattr(exporting, "BLOCK_BYTES", most)
    save(LocalFiles(tmp_path), make_state(), 10)
    assert evenkeel(f"checkpoint export {tmp_path} --to {tmp_path}/to --format safetensors").status == 0
    assert same(load_file(tmp_path / "to" / "model.safetensors"), weights(make_state()))


def test_small_tensors_are_read_together_and_large_ones_by_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exporting, "BLOCK_BYTES", 40)
    found = save(LocalFiles(tmp_path), make_state(), 10)
    tensors = [found.manifest.tensor(f"param/{name}") for name in ("blocks.0.bias", "scale", "none", "embed.weight")]
    kept = list(exporting.blocks(found, tensors))
    assert len({id(block.obj) for _, block in kept}) == 7
    assert [(name.removeprefix("param/"), len(block)) for name, block in kept] == [
        ("blocks.0.bias", 20), ("scale", 4), ("none", 0), *[("embed.weight", 32)] * 5, ("embed.weight", 16),
    ]  # fmt: skip


def test_export_into_a_folder_with_something_in_it_is_refused(tmp_path: Path, evenkeel: Run) -> None:
    save(LocalFiles(tmp_path), make_state(), 10)
    done = evenkeel(f"checkpoint export {tmp_path} --to {tmp_path} --format safetensors")
    assert done.status == 2
    assert done.err == f"evenkeel: {tmp_path}: is not empty; name a folder that is, or that does not exist\n"


def test_a_newer_one_that_is_cut_is_passed_over_and_named(tmp_path: Path, evenkeel: Run) -> None:
    save(LocalFiles(tmp_path), make_state(), 10)
    cut = save(LocalFiles(tmp_path), make_state(), 20)
    name = cut.manifest.files[0].name
    (tmp_path / cut.folder / name).unlink()
    done = evenkeel(f"checkpoint export {tmp_path} --to {tmp_path}/to --format safetensors")
    assert (done.status, done.out) == (0, f"step 10: 15 tensors in {tmp_path}/to\n")
    assert done.err == f"evenkeel: step 20 is damaged, so step 10 is taken: {cut.url}/{name}: missing\n"


def test_a_damaged_checkpoint_is_not_exported(tmp_path: Path, evenkeel: Run) -> None:
    flip(save(LocalFiles(tmp_path), make_state(), 10))
    done = evenkeel(f"checkpoint export {tmp_path} --to {tmp_path}/to --format safetensors")
    assert done.status == 3
    assert "are not what was written" in done.err
    assert len(done.err.splitlines()) == 1
    assert not (tmp_path / "to" / "model.safetensors").exists()


@pytest.mark.parametrize("step", [10, 20])
def test_an_export_of_what_the_run_removes_meanwhile_is_not_damage(
    tmp_path: Path, evenkeel: Run, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    """The run goes on: it saves step 20, or went back and saves step 10 once more, and keeps that one alone."""
    files = LocalFiles(tmp_path)
    found = save(files, make_state(), 10)
    read_into, reads = LocalFiles.read_into, []

    def meanwhile(self: LocalFiles, name: str, offset: int, buffer: memoryview) -> int | None:
        reads.append(name)
        if len(reads) == 3:
            save(files, make_state(), step, generation=2)
            Checkpoints(files).prune(keep=1)
        return read_into(self, name, offset, buffer)

    monkeypatch.setattr(LocalFiles, "read_into", meanwhile)
    done = evenkeel(f"checkpoint export {tmp_path} --to {tmp_path}/to --format safetensors")
    assert (done.status, done.out) == (2, "")
    what = "was removed or replaced by the run while it was read; take a newer step, or raise checkpoint.keep"
    assert done.err == f"evenkeel: {found.url}: {what}\n"
    assert LocalFiles(tmp_path / "to").names("") == ["README.md", "checkpoint.json", "config.json"]
    assert evenkeel(f"checkpoint import {tmp_path}/new --from {tmp_path}/to --format safetensors").status == 2
    assert evenkeel(f"checkpoint export {tmp_path} --to {tmp_path}/again --format safetensors").status == 0


# ---------------------------------------------------------------- distrusted: copies of the state differed


WHY = "copies of step 20 differ: layers0-2.tp0 on w0001 w0002; nobody knows which of w0001, w0002 is right"


def journal_of_copies_that_differ(files: Files) -> None:
    """A run whose two copies of the state differ after step 20 of its first generation, so that it goes back to 10."""
    a, b = WorkerId("w0001"), WorkerId("w0002")
    layout = Layout((Pipeline((Stage(0, 2, (a,)),), 0, 2), Pipeline((Stage(0, 2, (b,)),), 2, 4)))
    members = tuple(WorkerInfo(worker, NodeId("here"), 1) for worker in (a, b))
    world = World(1, layout, INITIAL, members, (), (), 100, "start", "")
    vote = Vote(1, 21, (0.0,) * SLOTS, (Difference("layers0-2.tp0", ((a, 7), (b, 9))),))
    decision = m.Decision(1, Version(20, 1), None, "copies of step 20 differ", judge(vote))
    again = replace(world, generation=2, base=Version(10, 1), saved=True)
    journal = Journal(files)
    journal.append(1, [dump(entry, m.Entry) for entry in (m.EpochBegun(1), m.WorldOpened(world, ()))])
    journal.append(1, [dump(m.StepSettled(decision, {}, None, ()), m.Entry)])
    entries = (m.Restored(Version(10, 1), 1, "copies of step 20 differ"), m.WorldOpened(again, ()))
    journal.append(1, [dump(entry, m.Entry) for entry in entries])


def distrusted_run(files: Files) -> tuple[Checkpoint, Checkpoint]:
    """With a checkpoint of step 10, and one of step 20 that may hold a wrong copy."""
    saved = save(files, make_state(1), 10), save(files, make_state(2), 20)
    journal_of_copies_that_differ(files)
    return saved


def test_ls_and_inspect_say_what_may_hold_a_wrong_copy(files: Files, url: str, evenkeel: Run) -> None:
    distrusted_run(files)
    done = evenkeel(f"checkpoint ls {url} --json")
    rows = [(r["step"], r["state"], r["why"]) for r in done.json["checkpoints"]]
    assert rows == [(20, "distrusted", WHY), (10, "complete", "")]
    assert evenkeel(f"checkpoint ls {url}").out.splitlines()[1].endswith(f" distrusted: {WHY}")

    for step in ("", "--step 20"):
        assert evenkeel(f"checkpoint inspect {url} {step} --json").json["distrusted"] == WHY
        assert f"\ndistrusted  {WHY}\n" in evenkeel(f"checkpoint inspect {url} {step}").out
    assert evenkeel(f"checkpoint inspect {url} --step 10 --json").json["distrusted"] == ""
    assert "distrusted" not in evenkeel(f"checkpoint inspect {url} --step 10").out


def test_export_passes_over_what_is_distrusted_and_says_so(tmp_path: Path, evenkeel: Run) -> None:
    distrusted_run(LocalFiles(tmp_path))
    done = evenkeel(f"checkpoint export {tmp_path} --to {tmp_path}/to --format safetensors")
    assert (done.status, done.out) == (0, f"step 10: 15 tensors in {tmp_path}/to\n")
    assert done.err == f"evenkeel: step 20 is distrusted, so step 10 is taken: {WHY}\n"
    assert same(load_file(tmp_path / "to" / "model.safetensors"), weights(make_state(1)))

    done = evenkeel(f"checkpoint export {tmp_path} --to {tmp_path}/all --format safetensors --distrusted")
    assert (done.status, done.err) == (0, f"evenkeel: step 20 is distrusted: {WHY}\n")
    assert same(load_file(tmp_path / "all" / "model.safetensors"), weights(make_state(2)))


@pytest.mark.parametrize("command", ["verify", "export --to {0}/to --format safetensors"])
def test_asked_for_by_its_step_it_is_refused_unless_told_otherwise(tmp_path: Path, evenkeel: Run, command: str) -> None:
    _, wrong = distrusted_run(LocalFiles(tmp_path))
    line = f"checkpoint {command.format(tmp_path)} {tmp_path} --step 20"
    done = evenkeel(line)
    assert (done.status, done.out) == (2, "")
    there = "there are those of steps 10; --distrusted takes it all the same"
    assert done.err == f"evenkeel: {wrong.url}: is distrusted: {WHY}; {there}\n"
    assert not (tmp_path / "to").exists()

    done = evenkeel(f"{line} --distrusted")
    assert (done.status, done.err) == (0, f"evenkeel: step 20 is distrusted: {WHY}\n")
    assert done.out.startswith("step 20: ")
    done = evenkeel(f"checkpoint {command.format(tmp_path)} {tmp_path} --step 15")
    assert done.err == f"evenkeel: {tmp_path}: no complete checkpoint of step 15; there are those of steps 10\n"


def test_verify_leaves_out_what_is_distrusted_and_says_so(tmp_path: Path, evenkeel: Run) -> None:
    _, wrong = distrusted_run(LocalFiles(tmp_path))
    done = evenkeel(f"checkpoint verify {tmp_path}")
    assert (done.status, done.out) == (0, "step 10: whole\n")
    assert done.err == f"evenkeel: step 20 is distrusted, so it is not verified: {WHY}\n"
    assert evenkeel(f"checkpoint verify {tmp_path} --json").json == {
        "directory": str(tmp_path),
        "checkpoints": [{"step": 10, "damage": []}],
        "distrusted": [{"step": 20, "why": WHY}],
    }
    assert evenkeel(f"checkpoint verify {tmp_path} --step 10").err == ""

    done = evenkeel(f"checkpoint verify {tmp_path} --distrusted")
    assert (done.status, done.out) == (0, "step 20: whole\nstep 10: whole\n")
    assert done.err == f"evenkeel: step 20 is distrusted: {WHY}\n"
    flip(wrong)
    assert evenkeel(f"checkpoint verify {tmp_path} --distrusted").status == 3
    assert evenkeel(f"checkpoint verify {tmp_path}").status == 0


def test_where_all_are_distrusted_none_is_taken(tmp_path: Path, evenkeel: Run) -> None:
    wrong = save(LocalFiles(tmp_path), make_state(), 20)
    journal_of_copies_that_differ(LocalFiles(tmp_path))
    done = evenkeel(f"checkpoint export {tmp_path} --to {tmp_path}/to --format safetensors")
    assert (done.status, done.out) == (2, "")
    no_other = "there is no other; --distrusted takes it all the same"
    assert done.err == f"evenkeel: {wrong.url}: is distrusted: {WHY}; {no_other}\n"
    assert evenkeel(f"checkpoint verify {tmp_path} --step 20").err == done.err
    done = evenkeel(f"checkpoint verify {tmp_path}")
    assert (done.status, done.out) == (2, "")
    assert done.err.endswith(f"evenkeel: {tmp_path}: no other complete checkpoint to verify\n")


def test_a_manifest_that_comes_after_the_copies_differed_is_distrusted(tmp_path: Path, evenkeel: Run) -> None:
    files, state, late = LocalFiles(tmp_path), make_state(2), Version(20, 1)
    save(files, make_state(1), 10)
    parts = write_parts(files, late, state)
    journal_of_copies_that_differ(files)
    line = f"checkpoint export {tmp_path} --format safetensors --to {tmp_path}"
    assert evenkeel(f"{line}/before").err == ""
    commit(files, late, state, parts)
    assert evenkeel(f"checkpoint ls {tmp_path} --json").json["checkpoints"][0]["state"] == "distrusted"
    done = evenkeel(f"{line}/after")
    assert done.out.startswith("step 10: ")
    assert done.err == f"evenkeel: step 20 is distrusted, so step 10 is taken: {WHY}\n"


def test_the_same_step_made_once_more_is_trusted(tmp_path: Path, evenkeel: Run) -> None:
    distrusted_run(LocalFiles(tmp_path))
    save(LocalFiles(tmp_path), make_state(3), 20, generation=2)
    rows = evenkeel(f"checkpoint ls {tmp_path} --json").json["checkpoints"]
    assert [(r["step"], r["generation"], r["state"]) for r in rows] == [(20, 2, "complete"), (10, 1, "complete")]
    done = evenkeel(f"checkpoint verify {tmp_path}")
    assert (done.out, done.err) == ("step 20: whole\nstep 10: whole\n", "")
    done = evenkeel(f"checkpoint export {tmp_path} --to {tmp_path}/to --format safetensors")
    assert (done.out, done.err) == (f"step 20: 15 tensors in {tmp_path}/to\n", "")


def test_an_older_one_that_is_distrusted_is_not_worth_a_word(tmp_path: Path, evenkeel: Run) -> None:
    """After the run went back it has saved step 15, which is newer than step 20 of the generation before."""
    distrusted_run(LocalFiles(tmp_path))
    save(LocalFiles(tmp_path), make_state(3), 15, generation=2)
    done = evenkeel(f"checkpoint export {tmp_path} --to {tmp_path}/to --format safetensors")
    assert (done.out, done.err) == (f"step 15: 15 tensors in {tmp_path}/to\n", "")


def test_of_checkpoints_that_were_copied_alone_nothing_is_known(tmp_path: Path, evenkeel: Run) -> None:
    distrusted_run(LocalFiles(tmp_path / "run"))
    shutil.copytree(tmp_path / "run" / "checkpoints", tmp_path / "copy" / "checkpoints")
    rows = evenkeel(f"checkpoint ls {tmp_path}/copy --json").json["checkpoints"]
    assert [r["state"] for r in rows] == ["complete", "complete"]
    done = evenkeel(f"checkpoint export {tmp_path}/copy --to {tmp_path}/to --format safetensors")
    assert (done.out, done.err) == (f"step 20: 15 tensors in {tmp_path}/to\n", "")


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        (b"{", "/000002.json: not valid JSON"),
        (b'{"format": 99, "entries": []}', "/000002.json: has format 99; this evenkeel reads up to 1"),
        (b'{"format": 1, "entries": [{"type": "Unheard"}]}', "type 'Unheard' is not one of EpochBegun, "),
    ],
)  # fmt: skip
def test_a_journal_that_cannot_be_read_is_named(tmp_path: Path, evenkeel: Run, data: bytes, problem: str) -> None:
    files = LocalFiles(tmp_path)
    distrusted_run(files)
    files.replace("journal/000002.json", data)
    unknown = "; so it is not known which checkpoints may hold a wrong copy of the state"
    for command in ("ls", "inspect"):
        done = evenkeel(f"checkpoint {command} {tmp_path}")
        assert done.status == 0
        assert done.err.startswith(f"evenkeel: {tmp_path}/journal")
        assert problem in done.err
        assert done.err.endswith(f"{unknown}\n")
    for command in ("verify", f"export --to {tmp_path}/to --format safetensors"):
        done = evenkeel(f"checkpoint {command} {tmp_path}")
        assert (done.status, done.out) == (2, "")
        assert done.err.startswith(f"evenkeel: {tmp_path}/journal")
        assert problem in done.err
        assert done.err.endswith(f"{unknown}; --distrusted takes any\n")
        assert len(done.err.splitlines()) == 1
        done = evenkeel(f"checkpoint {command} {tmp_path} --distrusted")
        assert done.status == 0
        assert done.out.startswith("step 20: ")
        assert done.err.endswith(f"{unknown}\n")


# ---------------------------------------------------------------- a configuration that lies


LAUGHS = "a: &a [x,x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{name}: &{name} [{','.join([f'*{of}'] * 10)}]\n" for of, name in ("ab", "bc", "cd", "de")
)


CONFIGS = {
    "no number": ("run: {name: !!int x}\n", "cannot be read: ValueError: invalid literal for int()"),
    "no float": ("run: {name: !!float x}\n", "cannot be read: ValueError: could not convert string to float"),
    "no time": ("run: {name: !!timestamp x}\n", "cannot be read: AttributeError: "),
    "bytes": ("run: {name: !!binary eA==}\n", "run.name: is of type bytes; expected a text, a number or the like"),
    "a path": ("run: {name: !!python/object/apply:pathlib.Path [x]}\n", "run.name: is of type PosixPath; expected"),
    "deep": ("run: " + "[" * 100_000, "not valid YAML: nested deeper than 64 levels"),
    "deep to the right": ("run: " + "- " * 100, "not valid YAML: "),
    "deep in blocks": ("run: " + "- " * 200 + "x", "not valid YAML: "),
    "a call": ("run: !!python/object/apply:os.system [true]\n", "not valid YAML: could not determine a constructor"),
    "itself": ("run: &r {name: *r}\n", "not valid YAML: YAML recursive aliases are not supported"),
    "a merge of nothing": ("run: {<<: 5}\n", "not valid YAML: expected a mapping or list of mappings"),
    "aliases of aliases": (LAUGHS, "not valid YAML: more than 10000 values"),
    "a number of 60s": ("run: " + ":".join(["59"] * 10_000), "not valid YAML: a number, or a value with a tag (!)"),
    "half an interpolation": ("run: {name: '${a}${'}\n", "no viable alternative at input"),
    "a list": ("- run\n", "expected a mapping of sections at the top"),
    "a number": ("5", "expected a mapping of sections at the top"),
    "huge": ("x" * 300_000, "not valid YAML: 300000 characters, at most 262144 are read"),
}  # fmt: skip


@pytest.mark.parametrize("lie", CONFIGS)
def test_a_manifest_whose_configuration_lies_is_named(tmp_path: Path, evenkeel: Run, lie: str) -> None:
    config, problem = CONFIGS[lie]
    found = save(LocalFiles(tmp_path), make_state(), 10)
    content = replace(found.manifest.content, config=config)
    told = manifest.to_json(replace(found.manifest, content=content))
    (tmp_path / found.folder / "manifest.json").write_bytes(told)
    for command in ("inspect {0}", "inspect {0} --json", "export {0} --to {0}/to --format safetensors"):
        tracemalloc.start()
        try:
            done = evenkeel(f"checkpoint {command.format(tmp_path)}")
            assert tracemalloc.get_traced_memory()[1] < 32 << 20
        finally:
            tracemalloc.stop()
        assert (done.status, done.out) == (2, "")
        assert done.err.startswith(f"evenkeel: {found.url}: config")
        assert problem in done.err
        assert done.err.endswith("; take another step (--step)\n")
        assert len(done.err.splitlines()) == 1 and len(done.err) < 1500
    assert evenkeel(f"checkpoint verify {tmp_path}").status == 0
    assert not (tmp_path / "to" / "model.safetensors").exists()


# ---------------------------------------------------------------- import


def export(run: Path, to: Path, evenkeel: Run, *options: str) -> None:
    assert evenkeel(f"checkpoint export {run} --to {to} --format safetensors {' '.join(options)}").status == 0


def test_export_and_import_give_the_same_bits(tmp_path: Path, files: Files, url: str, evenkeel: Run) -> None:
    state, run = make_state(), tmp_path / "old"
    save(LocalFiles(run), state, 10, generation=4)
    export(run, tmp_path / "to", evenkeel)
    done = evenkeel(f"checkpoint import {url} --from {tmp_path}/to --format safetensors --json")
    assert done.status == 0, done.err
    found = opened(files, 10)
    assert done.json == {
        "checkpoint": found.url, "step": 10, "tensors": 15, "converted": 0, "moments_zero": False, "checked": False,
    }  # fmt: skip
    assert same(load(found), state)
    assert list(found.damage(thorough=True)) == []
    assert found.manifest.version == Version(10, 0)
    content = found.manifest.content
    assert (content.seed, content.samples) == (7, 320)
    assert describe.config_of(found) == {"run": {"name": "test"}}


def test_weights_alone_begin_a_run_at_step_0(tmp_path: Path, evenkeel: Run) -> None:
    run = tmp_path / "old"
    save(LocalFiles(run), make_state(), 10)
    export(run, tmp_path / "weights", evenkeel, "--weights-only")
    export(run, tmp_path / "all", evenkeel)
    for name, option in (("weights", ""), ("all", "--weights-only")):
        line = f"checkpoint import {tmp_path}/new-{name} --from {tmp_path}/{name} --format safetensors {option}"
        done = evenkeel(line)
        assert done.out.startswith("step 0: 15 tensors in ")
        assert done.out.endswith("; moments are zero; not compared with any model\n")
        found = opened(LocalFiles(tmp_path / f"new-{name}"), 0)
        zero = {n: v if n.startswith("param/") else np.zeros_like(v) for n, v in make_state().items()}
        assert same(load(found), zero)
        assert found.manifest.content.samples == 0


def test_weights_in_several_files_of_half_precision(tmp_path: Path, evenkeel: Run) -> None:
    source = tmp_path / "from"
    source.mkdir()
    half, double = np.array([1.5, -2.0, 65504.0], "float16"), np.array([[1 / 3]], "float64")
    save_file({"a": half}, source / "model-00001-of-00002.safetensors")
    save_file({"b": double}, source / "model-00002-of-00002.safetensors")
    done = evenkeel(f"checkpoint import {tmp_path}/new --from {source} --format safetensors")
    assert "; 1 converted to another dtype" in done.out
    state = load(opened(LocalFiles(tmp_path / "new"), 0))
    assert (state["param/a"].dtype, state["param/b"].dtype) == ("float32", "float64")
    assert state["param/a"].tolist() == half.tolist()
    assert state["exp_avg/b"].tolist() == [[0.0]]


def test_a_large_import_is_written_in_parts(tmp_path: Path, evenkeel: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    read, alive, most = plain._bytes, [], 0

    def noted(*where: Any) -> memoryview:
        nonlocal most
        data = read(*where)
        alive.append(weakref.ref(data))
        most = max(most, sum(len(held) for ref in alive if (held := ref()) is not None))
        return data

    one = np.arange(2500, dtype="float32").reshape(50, 50)
    state = {f"{kind}/{i}": one + i for kind in KINDS for i in range(12)}
    save(LocalFiles(tmp_path / "old"), state, 10)
    export(tmp_path / "old", tmp_path / "to", evenkeel)
    monkeypatch.setattr(importing, "PART_BYTES", 25_000)
    monkeypatch.setattr(plain, "_bytes", noted)
    assert evenkeel(f"checkpoint import {tmp_path}/new --from {tmp_path}/to --format safetensors").status == 0
    found = opened(LocalFiles(tmp_path / "new"), 10)
    assert len(found.manifest.files) == 18
    assert same(load(found), state)
    assert most <= 25_000 + one.nbytes


def test_what_an_interrupted_import_left_is_replaced(tmp_path: Path, evenkeel: Run) -> None:
    save(LocalFiles(tmp_path / "old"), make_state(), 10)
    export(tmp_path / "old", tmp_path / "to", evenkeel)
    LocalFiles(tmp_path / "new").replace("checkpoints/step-00000010/g0-import-0000.safetensors", b"half")
    assert evenkeel(f"checkpoint import {tmp_path}/new --from {tmp_path}/to --format safetensors").status == 0
    assert same(load(opened(LocalFiles(tmp_path / "new"), 10)), make_state())


def written(folder: Path, model: State, optimizer: State | None = None) -> Path:
    folder.mkdir()
    save_file(model, folder / "model.safetensors")
    if optimizer is not None:
        save_file(optimizer, folder / "optimizer.safetensors")
    return folder


ONE = np.ones((2, 3), "float32")


@pytest.mark.parametrize(
    ("model", "optimizer", "options", "problem"),
    [
        ({"w": ONE}, {"exp_avg/w": ONE, "exp_avg_sq/w": ONE}, "",
         "does not say which step its moments are of; say --step N, or --weights-only to begin anew at step 0"),
        ({"w": ONE}, {"exp_avg/w": ONE}, "--step 5",
         "missing beside the other moments: 'exp_avg_sq/w' (--weights-only leaves the moments out)"),
        ({"w": ONE}, {"exp_avg/w": ONE, "exp_avg_sq/w": ONE.T.copy()}, "--step 5",
         "'exp_avg_sq/w' has shape [3, 2], expected is [2, 3] (--weights-only leaves the moments out)"),
        ({"w": ONE}, {"exp_avg/w": ONE, "exp_avg_sq/w": ONE, "momentum_buffer/w": ONE}, "--step 5",
         "no tensor of a parameter or its AdamW moments: 'momentum_buffer/w' (--weights-only leaves the moments out)"),
        ({"w": ONE}, None, "--step 5",
         "holds no moments, which step 5 would need; without --step the run begins with these weights at step 0"),
        ({}, None, "", "holds no weights"),
    ],
)  # fmt: skip
def test_tensors_that_make_no_state_are_refused(
    tmp_path: Path, evenkeel: Run, model: State, optimizer: State | None, options: str, problem: str
) -> None:
    source = written(tmp_path / "from", model, optimizer)
    done = evenkeel(f"checkpoint import {tmp_path}/new --from {source} --format safetensors {options}")
    assert (done.status, done.err) == (2, f"evenkeel: {source}: {problem}\n")
    assert not (tmp_path / "new").exists()


def test_the_step_of_an_export_is_not_contradicted(tmp_path: Path, evenkeel: Run) -> None:
    save(LocalFiles(tmp_path / "old"), make_state(), 10)
    export(tmp_path / "old", tmp_path / "to", evenkeel)
    done = evenkeel(f"checkpoint import {tmp_path}/new --from {tmp_path}/to --format safetensors --step 7")
    assert done.status == 2
    assert "is the state after step 10, not 7; leave --step out, or begin anew at step 0" in done.err
    assert evenkeel(f"checkpoint import {tmp_path}/new --from {tmp_path}/to --format safetensors --step 10").status == 0


def test_only_a_new_run_takes_an_import(tmp_path: Path, evenkeel: Run) -> None:
    source, line = written(tmp_path / "from", {"w": ONE}), "checkpoint import {}/{} --from {} --format safetensors"
    save(LocalFiles(tmp_path / "saved"), make_state(), 10)
    done = evenkeel(line.format(tmp_path, "saved", source))
    assert done.status == 2
    assert "has a checkpoint of step 10 already; remove its folder checkpoints/ to begin from another\n" in done.err
    RunDirectory.at(f"{tmp_path}/begun").write_run(RunRecord("begun", "failed", 1.0, 1.0))
    done = evenkeel(line.format(tmp_path, "begun", source))
    assert done.status == 2
    assert "begun: a run of this name exists; import into the directory of a new one" in done.err


def test_a_parameter_in_two_files_is_named(tmp_path: Path, evenkeel: Run) -> None:
    source = written(tmp_path / "from", {"w": ONE})
    save_file({"w": ONE}, source / "model-2.safetensors")
    done = evenkeel(f"checkpoint import {tmp_path}/new --from {source} --format safetensors")
    assert done.err == f"evenkeel: {source}/model.safetensors: 'param/w' is in {source}/model-2.safetensors too\n"


@pytest.mark.parametrize(
    "text",
    [
        "{", "[]", '{"format": 1}', "[" * 100_000, '{"format": 1' + "0" * 5000,
        '{"format": 1, "step": -1, "generation": 0, "samples": 0, "seed": 0}',
        '{"format": 1, "step": 1%s, "generation": 0, "samples": 0, "seed": 0}' % ("0" * 4000),
        '{"format": 1, "step": 1, "generation": 0, "samples": 0, "seed": 18446744073709551616}',
    ],
)  # fmt: skip
def test_a_damaged_checkpoint_json_is_named(tmp_path: Path, evenkeel: Run, text: str) -> None:
    source = written(tmp_path / "from", {"w": ONE})
    (source / "checkpoint.json").write_text(text)
    done = evenkeel(f"checkpoint import {tmp_path}/new --from {source} --format safetensors")
    assert done.status == 2
    assert done.err.startswith(f"evenkeel: {source}/checkpoint.json: ")
    assert len(done.err.splitlines()) == 1 and len(done.err) < 1000


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("{", "damaged: not valid JSON: Expecting property name"),
        ("[" * 100_000, "damaged: nested too deeply"),
        ("[1]", "expected a mapping of sections at the top"),
    ],
)
def test_a_damaged_config_json_is_named(tmp_path: Path, evenkeel: Run, text: str, problem: str) -> None:
    save(LocalFiles(tmp_path / "old"), make_state(), 10)
    export(tmp_path / "old", tmp_path / "to", evenkeel)
    (tmp_path / "to" / "config.json").write_text(text)
    done = evenkeel(f"checkpoint import {tmp_path}/new --from {tmp_path}/to --format safetensors")
    assert done.status == 2
    assert done.err.startswith(f"evenkeel: {tmp_path}/to/config.json: {problem}")
    assert len(done.err.splitlines()) == 1 and len(done.err) < 1000


def test_every_text_of_a_configuration_survives_export_and_import(tmp_path: Path, evenkeel: Run) -> None:
    old = save(LocalFiles(tmp_path / "old"), make_state(), 10)
    content = replace(old.manifest.content, config="run: {name: test}\ndata: {path: 'data \U0001f600 \u00e9'}\n")
    sound = manifest.to_json(replace(old.manifest, content=content))
    (tmp_path / "old" / old.folder / "manifest.json").write_bytes(sound)
    export(tmp_path / "old", tmp_path / "to", evenkeel)
    assert evenkeel(f"checkpoint import {tmp_path}/new --from {tmp_path}/to --format safetensors").status == 0
    found = opened(LocalFiles(tmp_path / "new"), 10)
    assert describe.config_of(found) == {"run": {"name": "test"}, "data": {"path": "data \U0001f600 \u00e9"}}


def test_a_step_that_no_checkpoint_can_have_is_refused(tmp_path: Path, evenkeel: Run) -> None:
    source = written(tmp_path / "from", {"w": ONE}, {"exp_avg/w": ONE, "exp_avg_sq/w": ONE})
    done = evenkeel(f"checkpoint import {tmp_path}/new --from {source} --format safetensors --step {10**18}")
    assert done.status == 2
    assert done.err.startswith(f"evenkeel: {source}: is said to be the state after step {10**18}, at most ")
    assert not (tmp_path / "new").exists()


# ---------------------------------------------------------------- safetensors files that lie


def lying(header: Any, data: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def tensor(dtype: Any = "F32", shape: Any = (2,), offsets: Any = (0, 8)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        (b"", "is not a safetensors file: a header of 0 bytes in a file of 0"),
        (b"1234567", "is not a safetensors file: a header of 7 bytes in a file of 7"),
        (lying({}, length=2**63), "is not a safetensors file"),
        (lying({}, length=50), "is not a safetensors file: a header of 50 bytes in a file of 10"),
        (lying(b"{nonsense"), "its header is not valid JSON: Expecting property name"),
        (lying(b"\xff\xfe"), "its header is not valid JSON: Expecting value"),
        (lying(b"[" * 100_000), "its header is nested too deeply"),
        (lying(b"[" * 65 + b"]" * 65), "its header is nested too deeply"),
        (lying(b'{"w":' + b"9" * 5000 + b"}"), "its header is not valid JSON: Exceeds the limit"),
        (lying({"": tensor()}, b"x" * 8), "its name is not one of 1 to 1000 printable characters"),
        (lying({"w" * 1001: tensor()}, b"x" * 8), "its name is not one of 1 to 1000 printable characters"),
        (lying({"w\n": tensor()}, b"x" * 8), "its name is not one of 1 to 1000 printable characters"),
        (lying([]), "its header is not a JSON object"),
        (lying({"w": 5}), "tensor 'w': has no dtype, shape and data_offsets"),
        (lying({"w": {"dtype": "F32"}}), "tensor 'w': has no dtype, shape and data_offsets"),
        (lying({"w": tensor(offsets=[0])}, b"x" * 8), "tensor 'w': has no dtype, shape and data_offsets"),
        (lying({"w": tensor("I64")}, b"x" * 8), "dtype 'I64' is not that of a parameter (F64, F32, BF16, F16)"),
        (lying({"w": tensor(["F32"])}, b"x" * 8), "is not that of a parameter"),
        (lying({"w": tensor(shape=[-2])}, b"x" * 8), "must be whole numbers, not negative"),
        (lying({"w": tensor(shape="ab")}, b"x" * 8), "shape must be a list of at most 64 sides"),
        (lying({"w": tensor(shape=[1] * 65)}, b"x" * 4), "shape must be a list of at most 64 sides"),
        (lying({"w": tensor(shape=[2**62] * 100_000)}, b"x" * 8), "shape must be a list of at most 64 sides"),
        (lying({"w": tensor(shape=[2**62] * 64)}, b"x" * 8), "8 bytes are not those of F32 [4611686018427387904, "),
        (lying({"w": tensor(shape=[2**62 + 1])}, b"x" * 8), "must be whole numbers, not negative, to 4611686018"),
        (lying({"w": tensor(offsets=[10**4299, 10**4299 + 8])}, b"x" * 8), "must be whole numbers, not negative"),
        (lying({"w": tensor(shape=[True, 2])}, b"x" * 8), "must be whole numbers, not negative"),
        (lying({"w": tensor(shape=[2.0])}, b"x" * 8), "must be whole numbers, not negative"),
        (lying({"w": tensor(shape=[3])}, b"x" * 8), "8 bytes are not those of F32 [3]"),
        (lying({"w": tensor(shape=[2**40, 2**40], offsets=[0, 2**82])}, b"x" * 8), "must be whole numbers, not"),
        (lying({"w": tensor(shape=[2**59], offsets=[0, 2**61])}, b"x" * 8), "its tensors end at"),
        (lying({"w": tensor(offsets=[8, 16])}, b"x" * 16), "tensor 'w' begins at byte"),
        (lying({"w": tensor()}, b"x" * 9), "its tensors end at"),
        (lying({"w": tensor()}, b"x" * 7), "its tensors end at"),
        (lying({"v": tensor(), "w": tensor()}, b"x" * 8), "tensor 'w' begins at byte"),
    ],
)
def test_a_safetensors_file_that_lies_is_named(tmp_path: Path, evenkeel: Run, data: bytes, problem: str) -> None:
    (tmp_path / "model.safetensors").write_bytes(data)
    done = evenkeel(f"checkpoint import {tmp_path}/new --from {tmp_path} --format safetensors")
    assert done.status == 2
    assert done.err.startswith(f"evenkeel: {tmp_path}/model.safetensors: ")
    assert problem in done.err
    assert len(done.err.splitlines()) == 1
    assert len(done.err) < 1000


NUMBERS: list[Any] = [
    0, 1, 2, 8, 16, -1, True, None, 2.0, "2", 2**62, 2**62 + 1, 10**400, 10**4299, -(10**4299), [], [2], {}, [[[]]],
]  # fmt: skip
numbers = st.sampled_from(NUMBERS)
many = st.builds(lambda number, times: [number] * times, numbers, st.sampled_from([64, 65, 200]))
lied_tensors = st.fixed_dictionaries({
    "dtype": st.sampled_from(["F32", "F16", "F8", "", 7, None, [], "F" * 5000]),
    "shape": st.lists(numbers, max_size=4) | many | numbers,
    "data_offsets": st.lists(numbers, max_size=3) | st.sampled_from([[0, 8], [8, 16]]) | numbers,
})  # fmt: skip
names = st.sampled_from(["w", "v", "", "\n", "\ud800", "w" * 5000, "__metadata__"])


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(header=st.dictionaries(names, lied_tensors | numbers, max_size=3) | numbers)
def test_whatever_a_safetensors_header_says_it_is_refused_in_one_short_line(tmp_path: Path, header: Any) -> None:
    (tmp_path / "model.safetensors").write_bytes(lying(header, bytes(16)))
    files, problem, entries = LocalFiles(tmp_path), "", []
    try:
        entries = plain.read_header(files, "model.safetensors", files.sizes("")["model.safetensors"])
    except StoreError as error:
        problem = str(error)
    if problem:
        assert re.fullmatch(f"{tmp_path}/model.safetensors: .*", problem)
        assert problem.isprintable() and len(problem) < 1000
    else:
        assert sum(e.stop - e.start for e in entries) == 16
        assert all(e.dtype in ("F32", "F16") and len(e.shape) <= 64 for e in entries)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_whatever_is_in_a_safetensors_file_nothing_outside_it_is_read(tmp_path: Path, data: st.DataObject) -> None:
    save_file(make_state(), tmp_path / "model.safetensors")
    bits = bytearray((tmp_path / "model.safetensors").read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.one_of(st.integers(0, 11), st.integers(0, len(bits) - 1)))
        bits[at] = data.draw(st.integers(0, 255))
    bits = bits[: data.draw(st.one_of(st.just(len(bits)), st.integers(0, len(bits))))]
    (tmp_path / "changed").write_bytes(bits)
    problem, entries = "", []
    try:
        entries = plain.read_header(LocalFiles(tmp_path), "changed", len(bits))
    except StoreError as error:
        problem = str(error)
    assert not problem or re.fullmatch(f"{tmp_path}/changed: .*", problem)
    assert all(8 < e.start <= e.stop <= len(bits) for e in entries)


def test_a_folder_without_a_model_is_named(tmp_path: Path, evenkeel: Run) -> None:
    done = evenkeel(f"checkpoint import {tmp_path}/new --from {tmp_path} --format safetensors")
    assert done.err == f"evenkeel: {tmp_path}: there is no model.safetensors, and no model-*.safetensors\n"


def test_headers_are_read_as_the_library_reads_them(tmp_path: Path) -> None:
    state = make_state()
    save_file(state, tmp_path / "model.safetensors", metadata={"made": "by the library"})
    files = LocalFiles(tmp_path)
    entries = plain.read_header(files, "model.safetensors", files.sizes("")["model.safetensors"])
    data = (tmp_path / "model.safetensors").read_bytes()
    assert {e.name: (e.shape, data[e.start : e.stop]) for e in entries} == {
        name: (value.shape, value.tobytes()) for name, value in state.items()
    }


def test_every_bit_pattern_of_half_precision_is_converted(tmp_path: Path) -> None:
    every = np.arange(2**16, dtype="<u2")
    got = np.frombuffer(importing.converted(memoryview(every.tobytes()), "F16", "F32"), "<f4")
    assert np.array_equal(got, every.view("<f2").astype("<f4"), equal_nan=True)
    got = np.frombuffer(importing.converted(memoryview(every.tobytes()), "BF16", "F32"), "<u4")
    assert np.array_equal(got, every.astype("<u4") << 16)
