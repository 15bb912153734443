import random

import pytest
from random_clusters import GIB, decoder, node_kinds

from evenkeel.plan.hardware import Cluster, DeviceKind, Link, NodeKind
from evenkeel.plan.layout import Infeasible
from evenkeel.plan.parallel import Limits, choose, uniform
from evenkeel.plan.plans import Plan
from evenkeel.plan.shortage import CLOSE
from evenkeel.plan.workload import LayerWork, Workload

WORK = decoder(8, 4096, 4096)


def node(memory: int, devices: int = 1) -> NodeKind:
    return NodeKind(DeviceKind("card", memory, {"bf16": 1e14}, 1e12), devices, Link(1e11), Link(1e10))


def refused(cluster: Cluster, limits: Limits | None = None) -> Infeasible:
    found = choose(cluster, WORK, 8, limits=limits)
    assert isinstance(found, Infeasible)
    return found


def test_with_the_missing_bytes_it_fits_and_with_less_it_does_not() -> None:
    whole = Limits(memory=1.0)
    short = refused(Cluster(((node(8 * GIB), 2),)), whole).short_bytes
    assert isinstance(choose(Cluster(((node(8 * GIB + short), 2),)), WORK, 8, limits=whole), Plan)
    assert isinstance(choose(Cluster(((node(8 * GIB + short - CLOSE), 2),)), WORK, 8, limits=whole), Infeasible)


def test_on_as_many_nodes_as_it_says_it_fits_and_on_fewer_it_does_not() -> None:
    rng = random.Random(0)
    refusals = 0
    for _ in range(60):
        (kind,) = node_kinds(rng, 1, (1, 2, 4))
        limits = Limits(copies=rng.choice([1, 2]))
        found = choose(Cluster(((kind, 1),)), WORK, 8, limits=limits)
        if isinstance(found, Plan) or "it would fit on" not in found.reason:
            continue
        refusals += 1
        nodes = int(found.reason.split("it would fit on ")[1].split()[0])
        assert isinstance(choose(Cluster(((kind, nodes),)), WORK, 8, limits=limits), Plan)
        assert isinstance(choose(Cluster(((kind, nodes - 1),)), WORK, 8, limits=limits), Infeasible)
    assert refusals >= 10


def test_a_layer_that_fits_nowhere() -> None:
    reason = refused(Cluster(((node(1 * GIB), 4),))).reason
    assert reason.startswith("the model does not fit on 4 card: each lacks ")
    assert "no number of these nodes is enough, as a layer with its activations is too large" in reason


def test_uniform_pipelines_that_do_not_fit() -> None:
    found = uniform(Cluster(((node(1 * GIB), 4),)), WORK, 8)
    assert isinstance(found, Infeasible)
    assert "no number of equal pipelines" in found.reason


def test_a_degree_that_is_not_possible() -> None:
    assert refused(Cluster(((node(80 * GIB, 4), 1),)), Limits(tensor=8)).reason == (
        "TP degree 8 is not possible: it must divide 8 (heads, widths) and be at most 4, the devices of the largest "
        "node"
    )


@pytest.mark.parametrize(
    ("memory", "layers", "micro_batches", "message"),
    [
        (0, 1, 1, "memory of card is 0; it must be positive"),
        (-5, 1, 1, "memory of card is -5; it must be positive"),
        (1, 0, 1, "the model has no layers"),
        (1, 1, 0, "0 micro-batches are to be shared out; at least 1 is needed"),
    ],
)
def test_what_cannot_be_planned_for(memory: int, layers: int, micro_batches: int, message: str) -> None:
    work = Workload((LayerWork("layer", 1, 2, 1, 1, 1, 1, 1, 1),) * layers, "bf16", 1)
    for plan in (choose, uniform):
        with pytest.raises(ValueError, match=message):
            plan(Cluster(((node(memory), 1),)), work, micro_batches)


@pytest.mark.parametrize("field", ["tensor", "stages", "copies"])
def test_limits(field: str) -> None:
    with pytest.raises(ValueError, match=f"{field} is 0; it must be at least 1"):
        Limits(**{field: 0})
    with pytest.raises(ValueError, match=r"memory is 1\.5"):
        Limits(memory=1.5)
