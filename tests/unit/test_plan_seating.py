import random
from dataclasses import replace

import pytest
from random_clusters import decoder, node_kinds

from evenkeel.core.ids import NodeId, WorkerId
from evenkeel.core.layout import Layout, WorkerInfo, check_layout
from evenkeel.core.model import LayerShape, ModelShape, ParamShape
from evenkeel.plan.hardware import Cluster
from evenkeel.plan.layout import Infeasible
from evenkeel.plan.parallel import choose
from evenkeel.plan.plans import Plan
from evenkeel.plan.seating import seat


def some_plan(seed: int) -> tuple[Plan, list[WorkerInfo], ModelShape]:
    """Of a random cluster on which the model fits."""
    rng = random.Random(seed)
    while True:
        cluster = Cluster(tuple((kind, rng.randint(1, 3)) for kind in node_kinds(rng, rng.randint(1, 3), (1, 2, 4))))
        work = decoder(rng.randint(1, 10), rng.choice([1024, 2048, 4096]), 4096)
        plan = choose(cluster, work, rng.randint(1, 60))
        if isinstance(plan, Plan):
            break
    layers = tuple(LayerShape(f"layer{i}", (ParamShape(f"weight{i}", (8 + i, 8), 1),)) for i in range(len(work.layers)))
    return plan, workers_of(cluster, rng), ModelShape(layers, 8)


def workers_of(cluster: Cluster, rng: random.Random) -> list[WorkerInfo]:
    """One for each device, in any order."""
    workers = [
        WorkerInfo(WorkerId(f"w{k}-{n}-{d}"), NodeId(f"n{k}-{n}"), 1, "cuda", kind.device.name)
        for k, (kind, count) in enumerate(cluster.nodes)
        for n in range(count)
        for d in range(kind.devices)
    ]
    rng.shuffle(workers)
    return workers


def seated(plan: Plan, workers: list[WorkerInfo], model: ModelShape, previous: Layout | None = None) -> Layout:
    layout = seat(plan, workers, model, previous)
    assert isinstance(layout, Layout), layout
    check_layout(layout, model.depth, plan.micro_batches)
    info = {worker.worker_id: worker for worker in workers}
    wanted = [
        (p.share, tuple((s.layers, s.node.device.name) for s in p.stages))
        for p in plan.pipelines
        for _ in range(p.count)
    ]
    found = [(p.share, tuple(((s.start, s.stop), info[s.members[0]].kind) for s in p.stages)) for p in layout.pipelines]
    assert sorted(found) == sorted(wanted)
    for pipeline in layout.pipelines:
        for stage in pipeline.stages:
            assert len({info[worker].node_id for worker in stage.members}) == 1
            assert len({info[worker].kind for worker in stage.members}) == 1
    return layout


@pytest.mark.parametrize("seed", range(40))
def test_every_place_has_a_device_of_its_kind(seed: int) -> None:
    """And nobody moves when nothing has changed, in whatever order the workers come."""
    plan, workers, model = some_plan(seed)
    layout = seated(plan, workers, model)
    assert seated(plan, workers, model, layout) == layout
    random.Random(seed).shuffle(workers)
    assert seated(plan, workers, model, layout) == layout


@pytest.mark.parametrize("seed", range(40))
def test_a_spare_of_the_same_kind_takes_the_place(seed: int) -> None:
    plan, workers, model = some_plan(seed)
    layout = seated(plan, workers, model)
    gone = random.Random(seed).choice(layout.members)
    lost = next(worker for worker in workers if worker.worker_id == gone)
    spare = replace(lost, worker_id=WorkerId("spare"))
    # Who had no place before could take this one, too: none of them is here.
    rest = [worker for worker in workers if worker.worker_id in layout.places and worker.worker_id != gone]
    after = seated(plan, [*rest, spare], model, layout)
    assert [gone if worker == "spare" else worker for worker in after.members] == list(layout.members)


@pytest.mark.parametrize("seed", range(20))
def test_another_plan_keeps_the_pipelines_that_both_have(seed: int) -> None:
    """The same pipelines with one micro-batch moved: everybody stays."""
    plan, workers, model = some_plan(seed)
    layout = seated(plan, workers, model)
    other = replace(plan, pipelines=tuple(replace(p, share=p.share + 1) for p in plan.pipelines))
    assert seated(other, workers, model, layout).members == layout.members


def test_too_few_workers() -> None:
    plan, workers, model = some_plan(0)
    found = seat(plan, workers[:1], model, None)
    assert isinstance(found, Infeasible)
    assert "places for TP groups of" in found.reason
