"""How many copies of the optimizer state fit."""

from dataclasses import replace

from evenkeel.core.ids import NodeId, WorkerId
from evenkeel.core.layout import Layout, Pipeline, Stage, WorkerInfo
from evenkeel.core.model import LayerShape, ModelShape, ParamShape, Shard
from evenkeel.plan.memory import FOR_STATE, copies_that_fit, state_bytes

ELEMENTS = 4 * 1024
MODEL = ModelShape((LayerShape("one", (ParamShape("one.weight", (64, 64)),)),))
WORKERS = tuple(WorkerId(f"w{i}") for i in range(4))
LAYOUT = Layout(tuple(Pipeline((Stage(0, 1, (w,)),), i, i + 1) for i, w in enumerate(WORKERS)))


def infos(memory: float, device: str = "cuda") -> tuple[WorkerInfo, ...]:
    return tuple(WorkerInfo(w, NodeId(f"n{i % 2}"), 1, device, memory=int(memory)) for i, w in enumerate(WORKERS))


def fits(memory: float, device: str = "cuda", precision: str = "fp32") -> tuple[int | None, str]:
    return copies_that_fit(LAYOUT, MODEL, infos(memory / FOR_STATE + 1, device), precision)


def test_bytes_by_precision() -> None:
    whole, half = Shard(0, 1, 0, 1), Shard(0, 1, 0, 1, ((0, ELEMENTS // 2),))
    assert state_bytes(MODEL, whole, "fp32").total == 16 * ELEMENTS
    assert state_bytes(MODEL, half, "fp32").total == 12 * ELEMENTS
    assert state_bytes(MODEL, half, "bf16").total == 12 * ELEMENTS
    assert state_bytes(MODEL, whole, "fp64").total == 32 * ELEMENTS


def test_as_many_as_fit() -> None:
    assert fits(16 * ELEMENTS) == (None, "")
    copies, why = fits(15.9 * ELEMENTS)
    assert copies == 3
    assert why.startswith("3 copies of the optimizer state, as with 4 the state takes 0.0 GiB on w")
    assert fits(12 * ELEMENTS)[0] == 2
    assert fits(11.9 * ELEMENTS)[0] == 1
    assert fits(10 * ELEMENTS)[0] == 1
    copies, why = fits(9 * ELEMENTS)
    assert copies == 1
    assert why.startswith("1 copy of the optimizer state, though even with 1 the state takes ")


def test_workers_on_the_cpu_share_their_node() -> None:
    assert fits(2 * 16 * ELEMENTS, "cpu") == (None, "")
    assert fits(2 * 12 * ELEMENTS, "cpu")[0] == 2


def test_the_smallest_device_decides_and_an_unknown_one_does_not() -> None:
    large = list(infos(100 * ELEMENTS))
    large[3] = replace(large[3], memory=int(12 * ELEMENTS / FOR_STATE) + 1)
    assert copies_that_fit(LAYOUT, MODEL, large, "fp32")[0] == 2
    large[3] = replace(large[3], memory=0)
    assert copies_that_fit(LAYOUT, MODEL, large, "fp32") == (None, "")
