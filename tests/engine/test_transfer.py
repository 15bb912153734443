"""Resharding over real groups: whatever the layouts before and after, everybody ends up with its part of the whole."""

import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny import Tiny, layout_of
from torch import Tensor

from evenkeel.core.ids import NodeId, WorkerId
from evenkeel.core.layout import Layout, WorkerInfo
from evenkeel.core.model import ModelShape, Shard
from evenkeel.engine import transfer
from evenkeel.engine.groups import GroupSet
from evenkeel.engine.job import Job
from evenkeel.engine.progress import Progress
from evenkeel.engine.rendezvous import StoreServer
from evenkeel.engine.state import ShardState
from evenkeel.engine.transfer import carry_out
from evenkeel.plan.reshard import transfers
from evenkeel.plan.state import KINDS

DEPTH = 5
W = [WorkerId(f"w{i}") for i in range(4)]


def whole(shape: ModelShape) -> dict[str, Tensor]:
    """What every element of the state is to be, by tensor."""
    torch.manual_seed(0)
    names = [(kind, p) for layer in shape.layers for p in layer.params for kind in KINDS]
    return {f"{kind}/{p.name}": torch.randn(p.shape, dtype=torch.float64) for kind, p in names}


def holding(job: Job, shard: Shard, values: dict[str, Tensor]) -> ShardState:
    state = ShardState(job.model, job.shape, shard, "fp64")
    for name, value in values.items():
        if name.partition("/")[2] in state.boxes:
            state.tensor(name).copy_(value[state.box(name).slices])
    return state


def check(state: ShardState, values: dict[str, Tensor]) -> None:
    for parameter, box in state.boxes.items():
        for kind in KINDS:
            name = f"{kind}/{parameter}"
            assert torch.equal(state.tensor(name), values[name][box.slices]), name


def together(run: Callable[[WorkerId], None], workers: list[WorkerId]) -> None:
    errors: list[BaseException] = []

    def catch(worker: WorkerId) -> None:
        try:
            run(worker)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=catch, args=(worker,)) for worker in workers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


LAYOUTS: dict[str, Layout] = {
    "1x2x1": layout_of(W[:2], [[0, 2, DEPTH]], 1, [4]),
    "1x3x1": layout_of(W[:3], [[0, 1, 3, DEPTH]], 1, [4]),
    "1x1x2": layout_of(W[2:], [[0, DEPTH]], 2, [4]),
    "2x1x2": layout_of(W, [[0, DEPTH], [0, DEPTH]], 2, [2, 2]),
    "2x2x1": layout_of(W, [[0, 3, DEPTH], [0, 2, DEPTH]], 1, [2, 2]),
    "reversed": layout_of(W[::-1], [[0, 2, DEPTH], [0, 3, DEPTH]], 1, [2, 2]),
}


@pytest.mark.parametrize("batch_bytes", [transfer.BATCH_BYTES, 1000])
@pytest.mark.parametrize("after", LAYOUTS)
@pytest.mark.parametrize("before", LAYOUTS)
def test_everybody_gets_its_part_of_the_whole(
    before: str, after: str, batch_bytes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In one batch from each to each, and in many."""
    monkeypatch.setattr(transfer, "BATCH_BYTES", batch_bytes)
    job = Tiny(tmp_path, blocks=DEPTH - 2, tied=True)(W[0])
    old, new, values = LAYOUTS[before], LAYOUTS[after], whole(job.shape)
    servers = {worker: StoreServer() for worker in W}
    infos = [WorkerInfo(w, NodeId("here"), 0, store_port=servers[w].port) for w in W]
    held = {w: holding(job, old.shard(w), values) for w in old.members}
    plan = transfers(job.shape, [(w, old.shard(w)) for w in old.members], new, dict.fromkeys(W, NodeId("here")))
    assert not plan.missing

    def run(me: WorkerId) -> None:
        groups = GroupSet(1, me, infos, [], servers[me])
        groups.connect()
        target = held.get(me) if new.places.get(me) and held.get(me) and old.shard(me) == new.shard(me) else None
        if target is None:
            shard = new.shard(me) if me in new.places else Shard(0, 1, 0, 1)
            target = ShardState(job.model, job.shape, shard, "fp64")
        progress = Progress()
        progress.begin(1, 0, lambda: True)
        carry_out(plan, me, target, [held[me]] if me in held else [], groups.world, progress)
        groups.world.barrier()
        groups.close()
        if me in new.places:
            check(target, values)
        if me in held:
            check(held[me], values)

    together(run, W)
    for server in servers.values():
        server.close()
