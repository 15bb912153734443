"""A checkpoint of one layout is loaded on any other, and saved there again: every tensor of the state, bitwise."""


import pytest
import torch
from test_saver import Saved, Shell
from tiny import layout_of

from evenkeel.control.policy import Policy
from evenkeel.core.ids import INITIAL, NodeId, Version, WorkerId
from evenkeel.core.layout import WorkerInfo
from evenkeel.core.world import World
from evenkeel.engine.model import model_shape
from evenkeel.engine.progress import Progress
from evenkeel.engine.saver import _Part, load
from evenkeel.engine.state import ShardState
from evenkeel.plan.copies import copies_of, shards_in
from evenkeel.plan.layout import Wish
from evenkeel.plan.writers import written_by

VERSION = Version(3, 1)
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


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    """A run on 2x2x2 that has saved its third step."""
    job = Saved(tmp_path_factory.mktemp("saved"), precision="fp32", steps=3, tied=True)
    wish = Wish(data=2, pipeline=2, tensor=2, min_workers=8, max_workers=8)
    policy = Policy(model_shape(job.model()), wish, 4, job.steps, checkpoint_every=3)
    assert Shell(job, policy).run().named("checkpoint_committed")
    return job


@pytest.mark.parametrize("name", LAYOUTS)
def test_any_layout_loads_it_and_saves_the_same(name: str, saved: Saved) -> None:
    cuts, tensor, shares, copies = LAYOUTS[name]
    job, truth = saved(WorkerId("reader")), saved.state(VERSION)
    workers = [WorkerId(f"w{i}") for i in range(sum(len(cut) - 1 for cut in cuts) * tensor)]
    layout = layout_of(workers, cuts=cuts, tensor=tensor, shares=shares)
    infos = tuple(WorkerInfo(w, NodeId("n"), 1) for w in layout.members)
    nodes = tuple((w, NodeId("n")) for w in layout.members)
    world = World(2, layout, INITIAL, infos, (), nodes, 9, "", "", copies=copies)
    again = {tensor: torch.full_like(value, float("nan")) for tensor, value in truth.items()}
    for worker, shard in shards_in(world, job.shape).items():
        state = ShardState(job.model, job.shape, shard, "fp32")
        progress = Progress()
        progress.begin(2, 3, lambda: True)
        load(job, VERSION, state, progress)
        for tensor_name, box, view in state.pieces():
            assert torch.equal(view.view(box.shape), truth[tensor_name][box.slices])
        part = _Part(state, written_by(worker, copies_of(world, job.shape), layout, job.shape), None)
        part.copy()
        for piece in part.pieces:
            assert again[piece.tensor][piece.box.slices].isnan().all()
            again[piece.tensor][piece.box.slices] = piece.data.view(piece.box.shape)
    assert all(torch.equal(again[tensor_name], value) for tensor_name, value in truth.items())
