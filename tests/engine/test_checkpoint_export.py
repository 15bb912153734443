"""Checkpoints out to plain PyTorch and torch.distributed.checkpoint, and in from both, bit by bit."""

import os
import pickle
import shlex
import subprocess
import sys
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata
from torch.distributed.checkpoint.state_dict import get_state_dict

from evenkeel.cli import main
from evenkeel.config import load_config, to_yaml
from evenkeel.core.boxes import full
from evenkeel.core.ids import Version, WorkerId
from evenkeel.core.layout import Layout, Pipeline, Stage
from evenkeel.store.checkpoint_part import Piece
from evenkeel.store.checkpoint_reader import Checkpoint, Want
from evenkeel.store.checkpoints import Checkpoints
from evenkeel.store.files import LocalFiles
from evenkeel.store.manifest import Content
from evenkeel.store.run_directory import RunDirectory
from evenkeel.tools import importing

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")

State = dict[str, Tensor]
Evenkeel = Callable[[str], tuple[int, str, str]]

MOMENTS = ("exp_avg", "exp_avg_sq")
MODEL = """\
import torch
from torch import nn

torch.manual_seed(3)
model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 2))
optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)


def step():
    inputs = torch.randn(8, 6, generator=torch.Generator().manual_seed(1))
    optimizer.zero_grad()
    model(inputs).square().sum().backward()
    optimizer.step()
"""
NO_EVENKEEL = """\
import sys
import weakref

class Forbidden:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "evenkeel":
            raise ImportError("evenkeel is not to be needed")

sys.meta_path.insert(0, Forbidden())
"""


@pytest.fixture
def evenkeel(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Evenkeel:
    """Runs a command line: exit status, stdout, stderr."""

    def run(line: str) -> tuple[int, str, str]:
        capfd.readouterr()
        monkeypatch.setattr(sys, "argv", ["evenkeel", *shlex.split(line)])
        with pytest.raises(SystemExit) as end:
            main()
        out, err = capfd.readouterr()
        assert isinstance(end.value.code, int | None)
        return end.value.code or 0, out, err

    return run


class Trained:
    """MODEL after some steps of plain PyTorch."""

    def __init__(self, steps: int) -> None:
        names: dict[str, object] = {}
        exec(MODEL, names)
        self.model, self.optimizer, self.step = names["model"], names["optimizer"], names["step"]
        for _ in range(steps):
            self.step()

    @property
    def model_and_optimizer(self) -> tuple[nn.Module, torch.optim.Optimizer]:
        return self.model, self.optimizer

    def weights(self) -> State:
        return {name: value for name, value in self.state().items() if name.startswith("param/")}

    def state(self) -> State:
        """As a checkpoint has it."""
        state: State = {}
        for name, parameter in self.model.named_parameters():
            state[f"param/{name}"] = parameter.detach()
            for kind in MOMENTS:
                state[f"{kind}/{name}"] = self.optimizer.state[parameter][kind]
        return state


def as_bytes(tensor: Tensor) -> memoryview:
    return memoryview(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())


def save(files: LocalFiles, state: State, step: int) -> Checkpoint:
    store, at = Checkpoints(files), Version(step, 1)
    pieces = [Piece(n, "F32", tuple(t.shape), full(tuple(t.shape)), as_bytes(t)) for n, t in state.items()]
    layout = Layout((Pipeline((Stage(0, 3, (WorkerId("w0001"),)),), 0, 1),))
    part = store.write(at, "w0001", pieces)
    content = Content(seed=7, samples=8 * step, config="run:\n  name: old\n", layout=layout)
    return store.commit(at, content, [part], {n: tuple(t.shape) for n, t in state.items()}, epoch=1)


def load(files: LocalFiles, step: int) -> State:
    found = Checkpoints(files).open(step)
    assert found is not None
    assert {t.dtype for t in found.manifest.tensors} == {"F32"}
    state = {t.tensor: torch.empty(t.shape) for t in found.manifest.tensors}
    found.read([Want(n, full(tuple(t.shape)), as_bytes(t)) for n, t in state.items()])
    return state


def same(a: State, b: State) -> bool:
    """Bitwise."""
    return a.keys() == b.keys() and all(
        a[n].dtype == b[n].dtype and a[n].shape == b[n].shape and bytes(as_bytes(a[n])) == bytes(as_bytes(b[n]))
        for n in a
    )


# ---------------------------------------------------------------- out


@pytest.mark.parametrize("how", ["safetensors", "dcp"])
def test_plain_pytorch_trains_on_by_the_readme_without_evenkeel(tmp_path: Path, evenkeel: Evenkeel, how: str) -> None:
    trained = Trained(4)
    save(LocalFiles(tmp_path / "run"), trained.state(), 4)
    status, _, err = evenkeel(f"checkpoint export {tmp_path}/run --to {tmp_path}/to --format {how}")
    assert (status, err) == (0, "")
    recipe = (tmp_path / "to" / "README.md").read_text().partition("```python\n")[2].partition("```")[0]
    after = 'step()\nfrom safetensors.torch import save_file\nsave_file(model.state_dict(), "after.safetensors")\n'
    code = "\n".join((NO_EVENKEEL, MODEL, recipe, after))
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    command = [sys.executable, "-W", "ignore", "-c", code]
    done = subprocess.run(command, cwd=tmp_path / "to", env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    trained.step()
    assert same(load_file(tmp_path / "to" / "after.safetensors"), trained.model.state_dict())


def test_dcp_loads_every_tensor(tmp_path: Path, evenkeel: Evenkeel) -> None:
    state = Trained(3).state()
    save(LocalFiles(tmp_path), state, 3)
    assert evenkeel(f"checkpoint export {tmp_path} --to {tmp_path}/to --format dcp")[0] == 0
    names = sorted(n.removeprefix("param/") for n in state if n.startswith("param/"))
    weights = {n: torch.zeros_like(state[f"param/{n}"]) for n in names}
    moments = {n: {k: torch.zeros_like(state[f"{k}/{n}"]) for k in MOMENTS} | {"step": torch.zeros(())} for n in names}
    dcp.load({"model": weights, "optim": {"state": moments}}, checkpoint_id=tmp_path / "to")
    got = {f"param/{n}": weights[n] for n in names} | {f"{k}/{n}": moments[n][k] for n in names for k in MOMENTS}
    assert same(got, state)
    assert {moments[n]["step"].item() for n in names} == {3.0}


def test_one_tensor_is_in_memory_at_a_time(
    tmp_path: Path, evenkeel: Evenkeel, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[weakref.ref[Tensor]] = []
    most = 0

    def noted(tensor: Tensor) -> memoryview:
        nonlocal most
        made.append(weakref.ref(tensor))
        most = max(most, sum(ref() is not None for ref in made))
        return as_bytes(tensor)

    monkeypatch.setattr("evenkeel.tools.dcp._bytes", noted)
    save(LocalFiles(tmp_path / "old"), Trained(1).state(), 1)
    for line in ("export {0}/old --to {0}/to", "import {0}/new --from {0}/to"):
        assert evenkeel(f"checkpoint {line.format(tmp_path)} --format dcp")[0] == 0
    assert len(made) == 24
    assert most == 1


def test_weights_only_leaves_the_optimizer_out_of_dcp(tmp_path: Path, evenkeel: Evenkeel) -> None:
    save(LocalFiles(tmp_path), Trained(1).state(), 1)
    assert evenkeel(f"checkpoint export {tmp_path} --to {tmp_path}/to --format dcp --weights-only")[0] == 0
    keys = dcp.FileSystemReader(tmp_path / "to").read_metadata().state_dict_metadata
    assert sorted(keys) == ["model.0.bias", "model.0.weight", "model.2.bias", "model.2.weight"]


def test_a_damaged_checkpoint_does_not_become_a_dcp_one(tmp_path: Path, evenkeel: Evenkeel) -> None:
    found = save(LocalFiles(tmp_path), Trained(1).state(), 1)
    path = tmp_path / found.folder / found.manifest.files[0].name
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    status, out, err = evenkeel(f"checkpoint export {tmp_path} --to {tmp_path}/to --format dcp")
    assert (status, out) == (3, "")
    assert err.startswith(f"evenkeel: {path}: bytes 0 to ")
    assert len(err.splitlines()) == 1
    assert not (tmp_path / "to" / ".metadata").exists()


def test_a_checkpoint_that_is_removed_meanwhile_does_not_become_a_dcp_one(
    tmp_path: Path, evenkeel: Evenkeel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run goes on, and keeps the next one alone."""
    files, state = LocalFiles(tmp_path), Trained(1).state()
    found = save(files, state, 1)
    read_into, reads = LocalFiles.read_into, []

    def meanwhile(self: LocalFiles, name: str, offset: int, buffer: memoryview) -> int | None:
        reads.append(name)
        if len(reads) == 3:
            save(files, state, 2)
            Checkpoints(files).prune(keep=1)
        return read_into(self, name, offset, buffer)

    monkeypatch.setattr(LocalFiles, "read_into", meanwhile)
    status, out, err = evenkeel(f"checkpoint export {tmp_path} --to {tmp_path}/to --format dcp")
    assert (status, out) == (2, "")
    assert err.startswith(f"evenkeel: {found.url}: was removed or replaced by the run while it was read; ")
    assert len(err.splitlines()) == 1
    assert not (tmp_path / "to" / ".metadata").exists()


@pytest.mark.parametrize("command", ["export {0} --to memory://to", "import {0}/new --from memory://to"])
def test_dcp_is_for_local_folders(tmp_path: Path, evenkeel: Evenkeel, command: str) -> None:
    save(LocalFiles(tmp_path), Trained(1).state(), 1)
    status, _, err = evenkeel(f"checkpoint {command.format(tmp_path)} --format dcp")
    assert status == 2
    assert "torch.distributed.checkpoint's format is for local folders only; copy it" in err


# ---------------------------------------------------------------- in


@pytest.mark.parametrize("how", ["safetensors", "dcp"])
def test_export_and_import_give_the_same_bits(tmp_path: Path, evenkeel: Evenkeel, how: str) -> None:
    state = Trained(5).state()
    save(LocalFiles(tmp_path / "old"), state, 5)
    assert evenkeel(f"checkpoint export {tmp_path}/old --to {tmp_path}/to --format {how}")[0] == 0
    status, out, _ = evenkeel(f"checkpoint import {tmp_path}/new --from {tmp_path}/to --format {how}")
    assert (status, out.partition(" in ")[0]) == (0, "step 5: 12 tensors")
    assert same(load(LocalFiles(tmp_path / "new"), 5), state)
    found = Checkpoints(LocalFiles(tmp_path / "new")).open(5)
    assert found is not None
    content = found.manifest.content
    assert (found.manifest.version, content.samples, content.seed) == (Version(5, 0), 40, 7)


@pytest.mark.parametrize(
    "shape",
    [
        lambda weights, optim: {"model": weights, "optim": optim},
        lambda weights, optim: {"app": {"model": weights, "optim": optim}},
        lambda weights, optim: {"model": weights, "optimizer": optim, "scheduler": {"last": 4}, "rng": torch.zeros(3)},
        lambda weights, optim: {**weights, "optimizer": optim},
    ],
    ids=["model and optim", "below app", "beside other things", "bare weights"],
)
def test_what_plain_pytorch_saved_with_dcp_is_imported(
    tmp_path: Path, evenkeel: Evenkeel, shape: Callable[..., dict[str, object]]
) -> None:
    trained = Trained(4)
    weights, optim = get_state_dict(trained.model, trained.optimizer)
    dcp.save(shape(weights, optim), checkpoint_id=tmp_path / "from")
    status, out, err = evenkeel(f"checkpoint import {tmp_path}/new --from {tmp_path}/from --format dcp")
    assert (status, err) == (0, "")
    assert out.startswith("step 4: 12 tensors in ")
    assert same(load(LocalFiles(tmp_path / "new"), 4), trained.state())


def test_bfloat16_weights_become_float32(tmp_path: Path, evenkeel: Evenkeel) -> None:
    weights = {n: p.detach().to(torch.bfloat16) for n, p in Trained(2).model.named_parameters()}
    dcp.save({"model": weights}, checkpoint_id=tmp_path / "dcp")
    (tmp_path / "safetensors").mkdir()
    save_file(weights, tmp_path / "safetensors" / "model.safetensors")
    for how in ("dcp", "safetensors"):
        status, out, _ = evenkeel(f"checkpoint import {tmp_path}/new-{how} --from {tmp_path}/{how} --format {how}")
        assert status == 0
        assert "; moments are zero; 4 converted to another dtype; " in out
        got = load(LocalFiles(tmp_path / f"new-{how}"), 0)
        assert same({n: got[f"param/{n}"] for n in weights}, {n: w.float() for n, w in weights.items()})
        assert not any(t.any() for n, t in got.items() if not n.startswith("param/"))


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda s: s["optim"]["state"]["0.bias"].update(step=torch.tensor(9.0)),
         "the parameters' AdamW steps differ, 4 to 9; evenkeel has one"),
        (lambda s: s["optim"]["state"]["0.bias"].pop("exp_avg"),
         "missing beside the other moments: 'exp_avg/0.bias' (--weights-only leaves the moments out)"),
        (lambda s: s["optim"]["state"]["0.bias"].update(max_exp_avg_sq=torch.zeros(5)),
         "no tensor of a parameter or its AdamW moments: 'max_exp_avg_sq/0.bias' "
         "(--weights-only leaves the moments out)"),
        (lambda s: s["model"].update(ids=torch.zeros(5, dtype=torch.int64)),
         "'model.ids' has dtype torch.int64, which is not that of a parameter"),
    ],
)  # fmt: skip
def test_a_dcp_state_that_does_not_fit_is_named(
    tmp_path: Path, evenkeel: Evenkeel, change: Callable[..., object], problem: str
) -> None:
    trained = Trained(4)
    weights, optim = get_state_dict(trained.model, trained.optimizer)
    state = {"model": weights, "optim": optim}
    change(state)
    dcp.save(state, checkpoint_id=tmp_path / "from")
    status, _, err = evenkeel(f"checkpoint import {tmp_path}/new --from {tmp_path}/from --format dcp")
    assert status == 2
    assert err == f"evenkeel: {tmp_path}/from: {problem}\n"


@pytest.mark.parametrize(
    ("step", "said"),
    [
        (torch.tensor(float("nan")), "is nan"),
        (torch.tensor(float("inf")), "is inf"),
        (torch.tensor(-float("inf")), "is -inf"),
        (torch.tensor(4.5), "is 4.5"),
        (torch.tensor(-4.0), "is -4"),
        (torch.tensor(-4), "is -4"),
        (torch.tensor(1e30), "is 1e+30"),
        (torch.ones(3), "is torch.float32 of shape [3]"),
        (torch.ones(0), "is torch.float32 of shape [0]"),
        (torch.tensor(True), "is torch.bool of shape []"),
        (torch.tensor(4 + 0j), "is torch.complex64 of shape []"),
    ],
)
def test_a_step_that_is_none_is_named_where_it_stands(
    tmp_path: Path, evenkeel: Evenkeel, step: Tensor, said: str
) -> None:
    weights, optim = get_state_dict(*(trained := Trained(4)).model_and_optimizer)
    optim["state"]["0.bias"]["step"] = step
    dcp.save({"model": weights, "optim": optim}, checkpoint_id=tmp_path / "from")
    line = f"checkpoint import {tmp_path}/new --from {tmp_path}/from --format dcp"
    status, _, err = evenkeel(line)
    what = "AdamW's step must be one whole number, 0 to 4611686018427387904; --weights-only begins anew without it"
    assert (status, err) == (2, f"evenkeel: {tmp_path}/from: 'optim.state.0.bias.step' {said}: {what}\n")
    assert not (tmp_path / "new").exists()
    assert evenkeel(f"{line} --weights-only")[0] == 0
    got = load(LocalFiles(tmp_path / "new"), 0)
    assert same({n: got[n] for n in got if n.startswith("param/")}, trained.weights())


@pytest.mark.parametrize("step", [torch.tensor(4), torch.tensor([4.0]), torch.tensor(4, dtype=torch.int32)])
def test_a_step_of_another_dtype_or_shape_is_taken(tmp_path: Path, evenkeel: Evenkeel, step: Tensor) -> None:
    trained = Trained(4)
    weights, optim = get_state_dict(*trained.model_and_optimizer)
    for moments in optim["state"].values():
        moments["step"] = step
    dcp.save({"model": weights, "optim": optim}, checkpoint_id=tmp_path / "from")
    assert evenkeel(f"checkpoint import {tmp_path}/new --from {tmp_path}/from --format dcp")[0] == 0
    assert same(load(LocalFiles(tmp_path / "new"), 4), trained.state())


@pytest.mark.parametrize("notes", [b"\x80\x02Nr\xff\xff\xff\x7f.", b"Np2147483647\n."])
def test_metadata_that_makes_pickle_take_gigabytes_is_refused(
    tmp_path: Path, evenkeel: Evenkeel, notes: bytes
) -> None:
    (tmp_path / "from").mkdir()
    (tmp_path / "from" / ".metadata").write_bytes(notes)
    status, _, err = evenkeel(f"checkpoint import {tmp_path}/new --from {tmp_path}/from --format dcp")
    what = f"UnpicklingError: notes a value as number 2147483647 in {len(notes)} bytes"
    assert (status, err) == (2, f"evenkeel: {tmp_path}/from/.metadata: cannot be read: {what}\n")


class Bomb:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self.path,)


def test_metadata_runs_no_code(tmp_path: Path, evenkeel: Evenkeel) -> None:
    (tmp_path / "from").mkdir()
    (tmp_path / "from" / ".metadata").write_bytes(pickle.dumps(Bomb(tmp_path / "exploded")))
    status, _, err = evenkeel(f"checkpoint import {tmp_path}/new --from {tmp_path}/from --format dcp")
    assert status == 2
    assert err.startswith(f"evenkeel: {tmp_path}/from/.metadata: cannot be read: UnpicklingError: ")
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize("lost", [".metadata", "__0_0.distcp"])
def test_a_file_that_is_missing_from_a_dcp_folder_is_named(tmp_path: Path, evenkeel: Evenkeel, lost: str) -> None:
    dcp.save({"model": {"w": torch.ones(3)}}, checkpoint_id=tmp_path / "from")
    (tmp_path / "from" / lost).unlink()
    status, _, err = evenkeel(f"checkpoint import {tmp_path}/new --from {tmp_path}/from --format dcp")
    assert status == 2
    assert f"{tmp_path}/from" in err
    assert "missing" in err
    assert len(err.splitlines()) == 1


def lie(folder: Path, change: Callable[[Metadata], object]) -> None:
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    change(metadata)
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))


@pytest.mark.parametrize("outside", ["../other/__0_0.distcp", "{0}/other/__0_0.distcp", "..", "nosuch"])
def test_nothing_outside_a_dcp_folder_is_read(tmp_path: Path, evenkeel: Evenkeel, outside: str) -> None:
    for name, value in (("other", 7.0), ("from", 1.0)):
        dcp.save({"model": {"w": torch.full((3,), value)}}, checkpoint_id=tmp_path / name)
    path = outside.format(tmp_path)

    def elsewhere(metadata: Metadata) -> None:
        metadata.storage_data = {at: replace(info, relative_path=path) for at, info in metadata.storage_data.items()}

    lie(tmp_path / "from", elsewhere)
    status, _, err = evenkeel(f"checkpoint import {tmp_path}/new --from {tmp_path}/from --format dcp")
    problem = f"there are data in {path!r}, which is missing in the folder"
    assert (status, err) == (2, f"evenkeel: {tmp_path}/from/.metadata: {problem}\n")
    assert not (tmp_path / "new").exists()


def _huge(metadata: Metadata) -> None:
    """One of the tensors, which another makes up for in the sum."""
    stored, huge = metadata.state_dict_metadata, torch.Size([10**12])
    stored["model.w"] = replace(stored["model.w"], size=huge, chunks=[ChunkStorageMetadata(torch.Size([0]), huge)])
    stored["rng"] = replace(stored["rng"], size=torch.Size([-(10**12)]))


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (_huge, "'rng': sizes and offsets must be whole numbers, not negative"),
        (lambda m: m.state_dict_metadata.update(w=replace(m.state_dict_metadata["rng"], size=torch.Size([10**9]))),
         "tensors of 4000000024 bytes in files of "),
        (lambda m: m.state_dict_metadata.update(w=replace(m.state_dict_metadata["rng"], size=(10**5000,))),
         "'w': sizes and offsets must be whole numbers, not negative, to 4611686018427387904"),
        (lambda m: m.state_dict_metadata.update(w=replace(m.state_dict_metadata["rng"], size=torch.Size([1] * 65))),
         "'w': its size [1, 1, "),
        (lambda m: m.state_dict_metadata.update(w=replace(m.state_dict_metadata["rng"], size=torch.Size([2**40] * 9))),
         "'w': its size [1099511627776, "),
        (lambda m: vars(m.state_dict_metadata["rng"].properties).update(dtype="F32"),
         "damaged: TypeError: 'rng': its dtype is a str"),
        (lambda m: m.state_dict_metadata.update(w=replace(m.state_dict_metadata["rng"], size=None)),
         "damaged: TypeError: "),
        (lambda m: vars(m).update(storage_data=None), "damaged: AttributeError: "),
    ],
)  # fmt: skip
def test_metadata_that_lies_of_sizes_is_named(
    tmp_path: Path, evenkeel: Evenkeel, change: Callable[[Metadata], object], problem: str
) -> None:
    dcp.save({"model": {"w": torch.ones(3)}, "rng": torch.ones(3)}, checkpoint_id=tmp_path / "from")
    lie(tmp_path / "from", change)
    status, _, err = evenkeel(f"checkpoint import {tmp_path}/new --from {tmp_path}/from --format dcp")
    assert status == 2
    assert err.startswith(f"evenkeel: {tmp_path}/from/.metadata: {problem}")
    assert len(err.splitlines()) == 1 and len(err) < 1000


STRANGE = [
    None, -1, 0, 1, 3, 2**62, 2**62 + 1, 10**5000, 1.5, True, "", "x" * 5000, "a\nb", "..", "/etc/passwd", [], [[]],
    torch.Size([]), torch.Size([0]), torch.Size([2] * 70), torch.Size([2**40] * 3), [10**5000], [-1], [1.5], [None],
    torch.float64, torch.complex128, torch.quint8, torch.bits8,
]  # fmt: skip
steps = st.floats(width=32) | st.integers(-(2**63), 2**63 - 1) | st.lists(st.floats(width=32), max_size=3)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_whatever_a_dcp_folder_says_is_imported_or_refused_in_one_short_line(
    tmp_path_factory: pytest.TempPathFactory, evenkeel: Evenkeel, data: st.DataObject
) -> None:
    place = tmp_path_factory.mktemp("dcp")
    step = data.draw(st.just(4.0) | steps)
    moments = {"exp_avg": torch.ones(3), "exp_avg_sq": torch.ones(3), "step": torch.tensor(step)}
    state = {"model": {"w": torch.ones(3)}, "optim": {"state": {"w": moments}}}
    dcp.save(state, checkpoint_id=place / "from")

    def change(metadata: Metadata) -> None:
        stored = data.draw(st.sampled_from(sorted(metadata.state_dict_metadata)))
        tensor = metadata.state_dict_metadata[stored]
        info = data.draw(st.sampled_from([*metadata.storage_data.values()]))
        (chunk,) = tensor.chunks
        lied = data.draw(st.sampled_from([tensor, tensor.properties, chunk, info, metadata]))
        names = sorted(vars(lied).keys() - {"memory_format"})  # torch pickles that itself, and only what it knows
        vars(lied)[data.draw(st.sampled_from(names))] = data.draw(st.sampled_from(STRANGE))

    if step == 4.0:
        lie(place / "from", change)
    status, _, err = evenkeel(f"checkpoint import {place}/new --from {place}/from --format dcp")
    assert status in (0, 2)
    assert not err if status == 0 else err.startswith(f"evenkeel: {place}/from")
    assert len(err.splitlines()) <= 1 and len(err) < 1000
    if status == 0 and step != 4.0:
        assert torch.tensor(step).numel() == 1
        assert Checkpoints(LocalFiles(place / "new")).steps() == [int(torch.tensor(step).item())]


# ---------------------------------------------------------------- the run's model


DECODER = {"vocab_size": 24, "d_model": 16, "layers": 1, "heads": 4, "kv_heads": 2, "d_ff": 24, "seq_len": 8}


@pytest.fixture
def decoder(tmp_path: Path) -> State:
    """A run directory tmp_path/new with the configuration of a decoder; weights that fit it in tmp_path/from."""
    values = {"run": {"name": "new", "seed": 5}, "model": {"name": "decoder", **DECODER}}
    LocalFiles(tmp_path / "new").replace("config.yaml", to_yaml(load_config([], values=values)).encode())
    expected = importing.expected_of(RunDirectory.at(str(tmp_path / "new")))
    assert expected is not None
    state = {name: torch.randn(shape) for name, shape in expected.shapes.items()}
    (tmp_path / "from").mkdir()
    save_file(state, tmp_path / "from" / "model.safetensors")
    return state


def test_weights_are_compared_with_the_runs_model(tmp_path: Path, evenkeel: Evenkeel, decoder: State) -> None:
    line = f"checkpoint import {tmp_path}/new --from {tmp_path}/from --format safetensors"
    assert evenkeel(line)[1].endswith("; moments are zero\n")
    got = load(LocalFiles(tmp_path / "new"), 0)
    assert same({n.removeprefix("param/"): t for n, t in got.items() if n.startswith("param/")}, decoder)
    found = Checkpoints(LocalFiles(tmp_path / "new")).open(0)
    assert found is not None
    assert found.manifest.content.seed == 5
    assert found.manifest.content.layout.pipelines[0].stages[0].stop == 3


def test_weights_that_do_not_fit_the_runs_model_are_named(tmp_path: Path, evenkeel: Evenkeel, decoder: State) -> None:
    state = {n: t for n, t in decoder.items() if n != "head.norm.weight"}
    state["lm_head.weight"] = torch.ones(2)
    state["embed.tokens.weight"] = torch.ones(16, 24)
    save_file(state, tmp_path / "from" / "model.safetensors")
    line = f"checkpoint import {tmp_path}/new --from {tmp_path}/from --format safetensors"
    status, _, err = evenkeel(line)
    assert status == 2
    assert err == (
        f"evenkeel: {tmp_path}/from: missing of the model: 'head.norm.weight'; not of the model: 'lm_head.weight'; "
        "'param/embed.tokens.weight' has shape [16, 24], expected is [24, 16]\n"
    )
    assert Checkpoints(LocalFiles(tmp_path / "new")).steps() == []
    assert evenkeel(f"{line} --unchecked")[0] == 0


def test_a_run_in_fp64_gets_float64(tmp_path: Path, evenkeel: Evenkeel, decoder: State) -> None:
    config = tmp_path / "new" / "config.yaml"
    config.write_text(config.read_text().replace("precision: fp32", "precision: fp64"))
    assert evenkeel(f"checkpoint import {tmp_path}/new --from {tmp_path}/from --format safetensors")[0] == 0
    found = Checkpoints(LocalFiles(tmp_path / "new")).open(0)
    assert found is not None
    assert {t.dtype for t in found.manifest.tensors} == {"F64"}


def test_a_bad_config_of_the_run_is_named(tmp_path: Path, evenkeel: Evenkeel, decoder: State) -> None:
    config = tmp_path / "new" / "config.yaml"
    config.write_text(config.read_text().replace("heads: 4", "heads: 5"))
    status, _, err = evenkeel(f"checkpoint import {tmp_path}/new --from {tmp_path}/from --format safetensors")
    assert status == 2
    assert err.startswith(f"evenkeel: {config}: model.heads: ")
