"""The formula of plan/memory.py against the buffers that there are; and what workers tell of their memory."""

import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from processes import run_processes
from tiny import Tiny, layout_of

from evenkeel.control.policy import Policy
from evenkeel.core.ids import NodeId, WorkerId
from evenkeel.core.layout import WorkerInfo
from evenkeel.engine.allocator import keep_freed_memory
from evenkeel.engine.local import LocalRun, static_world
from evenkeel.engine.memory import Usage, device_bytes, peak_bytes
from evenkeel.engine.mirror import Snapshot
from evenkeel.engine.model import model_shape
from evenkeel.engine.state import ShardState
from evenkeel.plan.copies import copies_of, place_copies, shards, shards_in
from evenkeel.plan.layout import Wish
from evenkeel.plan.memory import Uses, host_bytes, state_bytes
from evenkeel.plan.mirrors import mirrors_of
from evenkeel.plan.state import KINDS
from evenkeel.plan.writers import written_by

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
        assert 0 < line.fields["activations"] < line.fields["peak"] - takes.total
        assert line.fields["peak"] < line.fields["available"]


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp64"])
@pytest.mark.parametrize("copies", [1, 2])
def test_the_formula_of_what_is_beside_the_state(copies: int, precision: str, tmp_path: Path) -> None:
    """What a checkpoint's part is copied to, and two versions of a worker's own mirror and of those that it keeps."""
    job = Tiny(tmp_path, tied=True)(W[0])
    layout = layout_of(W, [[0, 2, 4], [0, 3, 4]], 1, [2, 2])
    nodes = {worker: NodeId(f"n{i % 2}") for i, worker in enumerate(W)}
    infos = [WorkerInfo(worker, nodes[worker], 0) for worker in W]
    world = replace(static_world(infos, layout, 9), copies=copies)
    owned = copies_of(world, job.shape)
    mirrors = mirrors_of(world, job.shape, owned)
    saved = host_bytes(layout, job.shape, owned, precision, Uses(saves=True))
    mirrored = host_bytes(layout, job.shape, owned, precision, Uses(mirrors=True))
    both = host_bytes(layout, job.shape, owned, precision, Uses(True, True))
    for worker, shard in shards_in(world, job.shape).items():
        state = ShardState(job.model, job.shape, shard, precision)
        spans = written_by(worker, owned, layout, job.shape)
        assert saved[worker] == sum(state.range(kind, s.start, s.stop).nbytes for kind in KINDS for s in spans) > 0
        of = [x.shard for owner, x in mirrors.items() if worker in (owner, x.keeper)]
        assert len(of) == 2
        assert mirrored[worker] == 2 * sum(Snapshot(job.shape, s, state.params.dtype, False).flat.nbytes for s in of)
        assert both[worker] == saved[worker] + mirrored[worker]


MIB = 2**20


def use_memory(rank: int) -> tuple[int, int]:
    """As a worker does in its first step: activations come and go, and beside them a buffer is made that stays."""
    keep_freed_memory()
    state = torch.ones(100 * MIB, dtype=torch.uint8)
    gone = torch.ones(300 * MIB, dtype=torch.uint8)
    del gone  # given back to the system: blocks of that size are
    usage = Usage(torch.device("cpu"))
    activations = [torch.ones(20 * MIB, dtype=torch.uint8) for _ in range(8)]
    stays = torch.ones(60 * MIB, dtype=torch.uint8)
    del activations
    measured = usage.measured()
    assert len(state) + len(stays) == 160 * MIB
    return measured


def test_activations_are_what_a_step_takes_in_passing() -> None:
    [(peak, activations)] = run_processes(use_memory, 1)
    assert 160 <= activations / MIB < 200
    assert peak / MIB > 400  # before the step
