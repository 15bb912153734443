import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from random_layouts import layouts, models, nodes

from evenkeel.core.ids import NodeId, WorkerId
from evenkeel.core.model import ModelShape
from evenkeel.plan.copies import place_copies
from evenkeel.plan.flat import flat_places
from evenkeel.plan.writers import ranges_written, written_by

ALIGNMENT = 4


@settings(max_examples=150)
@given(data=st.data(), model=models(), node_of=nodes(), copies=st.integers(1, 4))
def test_every_element_is_written_once(
    data: st.DataObject, model: ModelShape, node_of: dict[WorkerId, NodeId], copies: int
) -> None:
    """Counted on whole tensors; and what a span says of a worker's flat buffer is what lies there."""
    layout = data.draw(layouts(model.depth))
    placed = place_copies(layout, model, copies, node_of, ALIGNMENT)
    times = {p.name: np.zeros(p.shape, int) for layer in model.layers for p in layer.params}
    numbers = {name: np.arange(count.size).reshape(count.shape) for name, count in times.items()}
    ranges = ranges_written(placed, layout, model, ALIGNMENT)
    for worker in layout.members:
        places = flat_places(model, layout.shard(worker), ALIGNMENT)
        flat = {(p.param.name, p.start + i): n for p in places
                for i, n in enumerate(numbers[p.param.name][p.box.slices].ravel().tolist())}  # fmt: skip
        spans = written_by(worker, placed, layout, model, ALIGNMENT)
        assert list(ranges[worker]) == [(span.start, span.stop) for span in spans]
        for span in spans:
            for piece in span.pieces:
                name, size = piece.param.name, piece.box.size
                assert span.start <= piece.start and piece.start + size <= span.stop
                there = [flat[name, piece.start + i] for i in range(size)]
                assert there == numbers[name][piece.box.slices].ravel().tolist()
                times[name][piece.box.slices] += 1
    assert all((count == 1).all() for count in times.values())


def test_writers_share_the_work() -> None:
    """Two pipelines of one worker each write half of the state, to within one alignment unit."""
    from evenkeel.core.layout import Layout, Pipeline, Stage
    from evenkeel.core.model import LayerShape, ParamShape

    a, b = WorkerId("a"), WorkerId("b")
    model = ModelShape((LayerShape("one", (ParamShape("one.weight", (33, 4)), ParamShape("one.bias", (5,)))),))
    layout = Layout((Pipeline((Stage(0, 1, (a,)),), 0, 1), Pipeline((Stage(0, 1, (b,)),), 1, 2)))
    placed = place_copies(layout, model, 2, {a: NodeId("n"), b: NodeId("m")}, ALIGNMENT)
    written = [written_by(worker, placed, layout, model, ALIGNMENT) for worker in (a, b)]
    sizes = [sum(span.stop - span.start for span in spans) for spans in written]
    assert sum(sizes) == 33 * 4 + 8 and abs(sizes[0] - sizes[1]) <= ALIGNMENT
