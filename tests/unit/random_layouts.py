"""Hypothesis strategies for small models and for layouts of them, as uneven as layouts may be."""

from itertools import pairwise

from hypothesis import strategies as st

from evenkeel.core.ids import NodeId, WorkerId
from evenkeel.core.layout import Layout, Pipeline, Stage
from evenkeel.core.model import LayerShape, ModelShape, ParamShape

DEGREES = (1, 2, 4)


def worker(i: int) -> WorkerId:
    return WorkerId(f"w{i:04d}")


@st.composite
def models(draw: st.DrawFn, max_depth: int = 5) -> ModelShape:
    """Models whose widths divide by 4, with scalars, uncut parameters and, at times, tied embeddings."""
    depth = draw(st.integers(1, max_depth))
    tied = depth > 1 and draw(st.booleans())
    layers: list[LayerShape] = []
    for i in range(depth):
        params: list[ParamShape] = []
        for j in range(draw(st.integers(1 if i == 0 else 0, 3))):
            shape, split = draw(
                st.sampled_from([((8, 3), 0), ((3, 4), 1), ((5,), None), ((), None), ((4,), 0), ((2, 4, 3), 1)])
            )
            params.append(ParamShape(f"layers.{i}.p{j}", shape, split))
        ties = (layers[0].params[0].name,) if tied and i == depth - 1 else ()
        layers.append(LayerShape(f"layers.{i}", tuple(params), float(draw(st.integers(0, 4))), ties))
    return ModelShape(tuple(layers), tensor_divides=4)


@st.composite
def layouts(draw: st.DrawFn, depth: int, pool: int = 24, max_pipelines: int = 3) -> Layout:
    """Layouts on workers out of `pool`, with TP 1, 2 or 4, each pipeline with cuts and a share of its own."""
    tensor = draw(st.sampled_from(DEGREES))
    ids = draw(st.permutations(range(pool)))
    pipelines: list[Pipeline] = []
    micro = 0
    for _ in range(draw(st.integers(1, max_pipelines))):
        room = len(ids) // tensor
        if room == 0:
            break
        cuts = sorted(draw(st.sets(st.integers(1, depth - 1), max_size=room - 1))) if depth > 1 else []
        bounds = [0, *cuts, depth]
        stages: list[Stage] = []
        for start, stop in pairwise(bounds):
            members, ids = ids[:tensor], ids[tensor:]
            stages.append(Stage(start, stop, tuple(worker(i) for i in members)))
        share = draw(st.integers(0, 3))
        pipelines.append(Pipeline(tuple(stages), micro, micro + share))
        micro += share
    return Layout(tuple(pipelines))


@st.composite
def nodes(draw: st.DrawFn, pool: int = 24) -> dict[WorkerId, NodeId]:
    return {worker(i): NodeId(f"n{draw(st.integers(0, 3))}") for i in range(pool)}
