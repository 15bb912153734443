"""What nobody holds, and who holds all of the state: few of many workers, by what they have between them."""

from itertools import product

from hypothesis import given
from hypothesis import strategies as st
from random_layouts import layouts, models, nodes

from evenkeel.core.boxes import Box
from evenkeel.core.ids import NodeId, WorkerId
from evenkeel.core.model import LayerShape, ModelShape, ParamShape, Shard
from evenkeel.core.world import Source
from evenkeel.plan.copies import place_copies
from evenkeel.plan.copies import shards as owned_shards
from evenkeel.plan.coverage import few_that_have_all, lost_slices
from evenkeel.plan.state import slices

MODEL = ModelShape(tuple(LayerShape(f"b{i}", (ParamShape(f"b{i}", (4, 4), 0),)) for i in range(4)), tensor_divides=4)
QUARTERS = (Shard(0, 2, 0, 2), Shard(0, 2, 1, 2), Shard(2, 4, 0, 2), Shard(2, 4, 1, 2))


def sources(*held: tuple[str, tuple[Shard, ...]]) -> list[Source]:
    return [Source(WorkerId(worker), shard) for worker, shards in held for shard in shards]


def test_two_of_three_with_mirrors_have_all() -> None:
    a, b, c, d = QUARTERS
    found = few_that_have_all(MODEL, sources(("w1", (a, d)), ("w2", (b, a)), ("w3", (c, b))))
    assert sorted(found) == ["w1", "w3"]


def test_of_copies_the_first_is_taken() -> None:
    a, b, _, _ = QUARTERS
    assert set(few_that_have_all(MODEL, sources(("w2", (a,)), ("w1", (a,)), ("w3", (b,))))) == {"w2", "w3"}


def test_shards_of_another_cut_count_by_what_is_in_them() -> None:
    """w1 and w2 have the whole model in halves; what w3 and w4 have is the same, cut in another way."""
    a, b, c, d = QUARTERS
    held = sources(("w3", (a, c)), ("w4", (b,)), ("w1", (Shard(0, 4, 1, 2),)), ("w2", (Shard(0, 4, 0, 2), d)))
    few = few_that_have_all(MODEL, held)
    assert len(few) == 2
    assert lost_slices(MODEL, [source.shard for source in held if source.worker_id in few]) == ()


def test_what_nobody_has_is_not_asked_for() -> None:
    a, _, _, d = QUARTERS
    assert few_that_have_all(MODEL, sources(("w1", (a,)), ("w2", (d,)))) == ("w1", "w2")
    assert few_that_have_all(MODEL, []) == ()


def elements(box: Box) -> set[tuple[int, ...]]:
    return set(product(*(range(a, b) for a, b in zip(box.start, box.stop, strict=True))))


@given(data=st.data(), model=models(), node_of=nodes())
def test_what_is_lost_is_what_no_shard_has_element_by_element(
    data: st.DataObject, model: ModelShape, node_of: dict[WorkerId, NodeId]
) -> None:
    held: list[Shard] = []
    for _ in range(data.draw(st.integers(1, 2))):
        layout = data.draw(layouts(model.depth))
        copies = data.draw(st.sampled_from([None, 1, 2]))
        if copies is None:
            held += [layout.shard(worker) for worker in layout.members]
        else:
            held += owned_shards(place_copies(layout, model, copies, node_of), layout, model).values()
    gone = data.draw(st.sets(st.integers(0, len(held) - 1), max_size=3))
    left = [shard for i, shard in enumerate(held) if i not in gone]
    found: dict[str, set[tuple[int, ...]]] = {}
    for shard in left:
        for piece in slices(model, shard):
            found.setdefault(piece.tensor, set()).update(elements(piece.box))
    whole = slices(model, Shard(0, model.depth, 0, 1))
    expected = dict.fromkeys(piece.tensor for piece in whole if elements(piece.box) - found.get(piece.tensor, set()))
    assert lost_slices(model, left) == tuple(expected)
