"""A checkpoint of one layout is loaded on any other, saved there, and loaded on the first again: everything bitwise.

All that a worker's own job does in the store is real. In bf16 the modules compute with copies, which a load renews.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load as load_tensors
from tiny import layout_of
from torch import Tensor

from evenkeel.config import load_config
from evenkeel.control import messages as m
from evenkeel.core.boxes import full
from evenkeel.core.ids import INITIAL, NodeId, Version, WorkerId
from evenkeel.core.layout import WorkerInfo
from evenkeel.core.world import World
from evenkeel.engine.job import Job, Piece
from evenkeel.engine.local import LocalRun
from evenkeel.engine.progress import Progress
from evenkeel.engine.saver import _Part, load
from evenkeel.engine.state import PRECISIONS, ShardState
from evenkeel.plan.copies import copies_of, shards_in
from evenkeel.plan.writers import written_by
from evenkeel.runtime import saving
from evenkeel.runtime.prepare import Prepared, prepare
from evenkeel.store.errors import StoreError
from evenkeel.store.files import LocalFiles
from evenkeel.store.run_directory import RunDirectory

FIRST, AGAIN = Version(3, 1), Version(3, 2)
LAYOUTS = {
    # name: (cuts of the pipelines over the layers, TP degree, shares of the 4 micro-batches, copies)
    "2x2x2": ([[0, 2, 4], [0, 2, 4]], 2, [2, 2], None),
    "1x1x1": ([[0, 4]], 1, [4], None),
    "3x1x1": ([[0, 4]] * 3, 1, [2, 1, 1], None),
    "3x1x1, one copy": ([[0, 4]] * 3, 1, [2, 1, 1], 1),
    "3x1x1, two copies": ([[0, 4]] * 3, 1, [2, 1, 1], 2),
    "1x2x1": ([[0, 3, 4]], 1, [4], None),
    "unequal": ([[0, 1, 4], [0, 2, 3, 4]], 1, [3, 1], None),
    "unequal, TP 2, one copy": ([[0, 1, 4], [0, 2, 3, 4]], 2, [3, 1], 1),
}


class Stored(LocalRun):
    """Completes checkpoints, as the Ray shell does."""

    def __init__(self, prepared: Prepared) -> None:
        super().__init__(prepared.maker, prepared.spec.policy)
        self._prepared = prepared

    def _carry_out(self, command: m.Command) -> None:
        if isinstance(command, m.CommitCheckpoint):
            self.fleet.events.put(saving.complete(self._prepared.directory, self._prepared.spec, command))
        else:
            super()._carry_out(command)


@dataclass(frozen=True)
class Saved:
    """A run on 2x2x2 that has saved its third step, and the state that it saved."""

    prepared: Prepared
    precision: str
    truth: Mapping[str, Tensor]


@pytest.fixture(scope="module", params=["fp32", "bf16"])
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Saved:
    """Parameters that the final model agrees with, which the workers gather without the store's help."""
    prepared = prepared_in(tmp_path_factory.mktemp("saved"), request.param)
    outcome = Stored(prepared).run()
    assert (outcome.status, outcome.error) == ("finished", "")
    truth = whole(prepared.maker(WorkerId("reader")), FIRST)
    final = load_tensors(prepared.directory.files.read("final/model.safetensors") or b"")
    assert all(torch.equal(truth[f"param/{name}"], value) for name, value in final.items())
    rounded = [torch.equal(value, value.bfloat16().float()) for value in truth.values()]
    assert not all(rounded), "a copy that was rounded would not show"
    return Saved(prepared, request.param, truth)


def prepared_in(folder: Path, precision: str) -> Prepared:
    text = folder / "text.txt"
    text.write_bytes(bytes(range(32, 127)) * 10)
    shape = {"d_model": 16, "layers": 2, "heads": 4, "kv_heads": 2, "d_ff": 24, "seq_len": 8, "tie_embeddings": True}
    train = {"steps": 3, "global_batch": 8, "micro_batch": 2, "learning_rate": 0.01, "warmup_steps": 1}
    values = {
        "run": {"name": "run", "storage_path": str(folder), "seed": 3},
        "model": {"name": "decoder", **shape},
        "data": {"name": "text", "path": str(text)},
        "train": {**train, "precision": precision},
        "scaling": {"workers": [8, 8]},
        "parallel": {"data": 2, "pipeline": 2, "tensor": 2},
        "checkpoint": {"every_steps": 3},
    }
    return prepare(load_config([], values=values))


def whole(job: Job, version: Version) -> dict[str, Tensor]:
    """Every tensor of the state, as the store gives it."""
    assert job.load is not None
    state = {name: torch.full(shape, float("nan")) for name, shape in saving.shapes(job.shape).items()}
    pieces = [Piece(name, value.shape, full(value.shape), value.view(-1)) for name, value in state.items()]
    job.load(version, pieces, lambda: None)
    return state


def world_of(name: str) -> World:
    cuts, tensor, shares, copies = LAYOUTS[name]
    workers = [WorkerId(f"w{i}") for i in range(sum(len(cut) - 1 for cut in cuts) * tensor)]
    layout = layout_of(workers, cuts=cuts, tensor=tensor, shares=shares)
    infos = tuple(WorkerInfo(w, NodeId("n"), 1) for w in layout.members)
    nodes = tuple((w, NodeId("n")) for w in layout.members)
    return World(2, layout, INITIAL, infos, (), nodes, 9, "", "", copies=copies)


def loaded(job: Job, version: Version, world: World, precision: str) -> dict[WorkerId, ShardState]:
    """What each worker of the world holds when it has read its shard."""
    states = {}
    for worker, shard in shards_in(world, job.shape).items():
        states[worker] = ShardState(job.model, job.shape, shard, precision)
        progress = Progress()
        progress.begin(2, 3, lambda: True)
        load(job, version, states[worker], progress)
    return states


def check(state: ShardState, saved: Saved) -> None:
    """What a worker owns, and what its modules compute with, is the truth to the last bit."""
    modules, pieces = dict(state.stage.named()), list(state.pieces())
    assert pieces
    for tensor, box, view in pieces:
        expected = saved.truth[tensor][box.slices]
        assert torch.equal(view.view(box.shape), expected), tensor
        kind, _, name = tensor.partition("/")
        if kind == "param":
            computed = modules[name].detach()[box.within(state.boxes[name])]
            assert computed.dtype == PRECISIONS[saved.precision]
            assert torch.equal(computed, expected.to(computed.dtype)), name


class Forbidding(LocalFiles):
    """A store in which whoever saves may not list what was begun and never finished."""

    def drop_unfinished(self, folder: str, which: Callable[[str], bool] = bool) -> int:
        raise StoreError(f"{folder}: AccessDenied")


def test_a_checkpoint_that_is_gone_is_said_to_be_also_where_not_all_could_be_removed(
    saved: Saved, tmp_path: Path
) -> None:
    """Else the controller would go back to it."""
    world, maker = world_of("1x1x1"), saved.prepared.maker
    ((worker, state),) = loaded(maker(WorkerId("reader")), FIRST, world, saved.precision).items()
    there = replace(maker, folder=str(tmp_path))(WorkerId("writer"))
    assert there.save is not None
    part = _Part(state, written_by(worker, copies_of(world, there.shape), world.layout, there.shape), None)
    part.copy()
    told: list[StoreError] = []
    events = []
    for version in (Version(3, 2), Version(6, 2), Version(9, 2)):
        written = there.save(version, worker, part.pieces, pytest.fail, bool)
        command = m.CommitCheckpoint(version, 1, world.layout, (written,), ())
        spec = replace(saved.prepared.spec, keep=1)
        events.append(saving.complete(RunDirectory(Forbidding(tmp_path)), spec, command, told.append))
    assert [(e.version.step, e.removed) for e in events if isinstance(e, m.CheckpointCommitted)] == [
        (3, ()),
        (6, (3,)),
        (9, (6,)),
    ]
    assert [str(error) for error in told] == ["checkpoints: AccessDenied"] * 3
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000009"]


@pytest.mark.parametrize("name", LAYOUTS)
def test_any_layout_loads_it_and_what_that_saves_is_the_same(name: str, saved: Saved, tmp_path: Path) -> None:
    world, maker = world_of(name), saved.prepared.maker
    states = loaded(maker(WorkerId("reader")), FIRST, world, saved.precision)
    there = replace(maker, folder=str(tmp_path))(WorkerId("writer"))
    assert there.save is not None
    parts = []
    for worker, state in states.items():
        check(state, saved)
        spans = written_by(worker, copies_of(world, there.shape), world.layout, there.shape)
        part = _Part(state, spans, None)
        part.copy()
        parts.append(there.save(AGAIN, worker, part.pieces, pytest.fail, bool))
    command = m.CommitCheckpoint(AGAIN, 1, world.layout, tuple(parts), ())
    saving.complete(RunDirectory.at(str(tmp_path)), saved.prepared.spec, command)
    again = whole(there, AGAIN)
    assert again.keys() == saved.truth.keys()
    assert all(torch.equal(again[tensor], value) for tensor, value in saved.truth.items())
    for state in loaded(there, AGAIN, world_of("2x2x2"), saved.precision).values():
        check(state, saved)
