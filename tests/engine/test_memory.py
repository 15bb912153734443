"""The formula of plan/memory.py against the buffers that there are; and what workers tell of their memory."""

import os
from pathlib import Path

import pytest
import torch
from tiny import Tiny, layout_of

from evenkeel.control.policy import Policy
from evenkeel.core.ids import NodeId, WorkerId
from evenkeel.engine.local import LocalRun
from evenkeel.engine.memory import device_bytes, peak_bytes
from evenkeel.engine.model import model_shape
from evenkeel.engine.state import ShardState
from evenkeel.plan.copies import place_copies, shards
from evenkeel.plan.layout import Wish
from evenkeel.plan.memory import state_bytes

W = [WorkerId(f"w{i}") for i in range(4)]


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp64"])
@pytest.mark.parametrize("copies", [1, 2])
def test_the_formula_is_what_the_buffers_take_up(copies: int, precision: str, tmp_path: Path) -> None:
    job = Tiny(tmp_path, tied=True)(W[0])
    layout = layout_of(W, [[0, 2, 4], [0, 3, 4]], 1, [2, 2])
    held = shards(place_copies(layout, job.shape, copies, dict.fromkeys(W, NodeId("n"))), layout, job.shape)
    for shard in held.values():
        state = ShardState(job.model, job.shape, shard, precision)
        tensors = [state.compute, state.grads, state.params, state.exp_avg, state.exp_avg_sq]
        buffers = {tensor.data_ptr(): tensor.nbytes for tensor in tensors if tensor.nbytes}
        assert sum(buffers.values()) == state_bytes(job.shape, shard, precision).total


def test_the_memory_of_this_machine() -> None:
    cpu = torch.device("cpu")
    assert 0 < peak_bytes(cpu) < device_bytes(cpu) <= os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def test_every_worker_tells_what_it_uses(tmp_path: Path) -> None:
    job = Tiny(tmp_path, steps=2)
    wish = Wish(data=2, pipeline=1, tensor=1, min_workers=2, max_workers=2)
    outcome = LocalRun(job, Policy(model_shape(job.model()), wish, 4, job.steps)).run()
    told = outcome.named("memory")
    assert sorted(line.fields["worker_id"] for line in told) == sorted(outcome.worlds[0].layout.members)
    for line in told:
        whole = outcome.worlds[0].layout.shard(line.fields["worker_id"])
        takes = state_bytes(model_shape(job.model()), whole, "fp64")
        assert (line.fields["params"], line.fields["grads"], line.fields["optimizer"]) == (
            takes.params, takes.grads, takes.optimizer,
        )  # fmt: skip
        assert takes.total < line.fields["peak"] < line.fields["available"]
