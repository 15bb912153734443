"""How many copies of the optimizer state fit."""

from dataclasses import replace

from evenkeel.core.ids import NodeId, WorkerId
from evenkeel.core.layout import Layout, Pipeline, Stage, WorkerInfo
from evenkeel.core.model import LayerShape, ModelShape, ParamShape, Shard
from evenkeel.plan.memory import FOR_STATE, Uses, copies_that_fit, state_bytes

ELEMENTS = 4 * 1024
NOTHING = Uses()
MODEL = ModelShape((LayerShape("one", (ParamShape("one.weight", (64, 64)),)),))
WORKERS = tuple(WorkerId(f"w{i}") for i in range(4))
LAYOUT = Layout(tuple(Pipeline((Stage(0, 1, (w,)),), i, i + 1) for i, w in enumerate(WORKERS)))


def infos(memory: float, device: str = "cuda") -> tuple[WorkerInfo, ...]:
    return tuple(WorkerInfo(w, NodeId(f"n{i % 2}"), 1, device, memory=int(memory)) for i, w in enumerate(WORKERS))


def fits(memory: float, device: str = "cuda", uses: Uses = NOTHING) -> tuple[int | None, str]:
    return copies_that_fit(LAYOUT, MODEL, infos(memory / FOR_STATE + 1, device), "fp32", uses)


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
    assert copies_that_fit(LAYOUT, MODEL, large, "fp32", NOTHING)[0] == 2
    large[3] = replace(large[3], memory=0)
    assert copies_that_fit(LAYOUT, MODEL, large, "fp32", NOTHING) == (None, "")


def test_on_the_cpu_what_checkpoints_and_mirrors_keep_is_in_the_same_memory() -> None:
    """Each worker writes a quarter, 3 bytes an element; with one copy it mirrors that, and another's, in 2 versions."""
    saves, both = Uses(saves=True), Uses(saves=True, mirrors=True)
    assert fits(2 * 19 * ELEMENTS, "cpu", saves) == (None, "")
    assert fits(2 * 18.9 * ELEMENTS, "cpu", saves)[0] == 3
    assert fits(2 * 13 * ELEMENTS, "cpu", saves)[0] == 1
    assert fits(2 * 19 * ELEMENTS, "cpu", both) == (None, "")
    assert fits(2 * 15 * ELEMENTS, "cpu", both)[0] == 2
    copies, why = fits(2 * 14.9 * ELEMENTS, "cpu", both)
    assert copies == 2, "one copy needs mirrors, and with them takes 25 bytes an element"
    assert why.startswith("2 copies of the optimizer state, though even with 2 the state takes ")
    assert copies_that_fit(LAYOUT, MODEL, infos(0, "cpu"), "fp32", both) == (None, "")


def test_a_gpu_has_nothing_of_them() -> None:
    assert fits(16 * ELEMENTS, "cuda", Uses(saves=True, mirrors=True)) == (None, "")
    assert fits(12 * ELEMENTS, "cuda", Uses(saves=True, mirrors=True))[0] == 2


def test_without_copies_mirrors_alone_may_be_too_much() -> None:
    """One pipeline of two stages of two layers: each owns all of its stage, and keeps the other's."""
    model = ModelShape(tuple(LayerShape(n, (ParamShape(f"{n}.weight", (64, 64)),)) for n in ("one", "two")))
    pair = infos(0)[::2]
    stages = tuple(Stage(i, i + 1, (info.worker_id,)) for i, info in enumerate(pair))
    layout = Layout((Pipeline(stages, 0, 1),))
    needs = 16 + 2 * (12 + 12)
    assert [info.node_id for info in pair] == ["n0", "n0"]
    for room, fitting in ((needs, True), (needs - 1, False)):
        members = infos(2 * room * ELEMENTS / FOR_STATE + 1, "cpu")[::2]
        copies, why = copies_that_fit(layout, model, members, "fp32", Uses(mirrors=True))
        assert (copies, why == "") == (None if fitting else 1, fitting)
