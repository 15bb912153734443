from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from random_layouts import layouts, models, worker

from evenkeel.core.boxes import Box
from evenkeel.core.ids import WorkerId
from evenkeel.core.layout import Layout, Pipeline, Stage, check_layout, segments, sync_groups
from evenkeel.core.model import ModelShape, Shard


@given(data=st.data(), depth=st.integers(1, 8))
def test_segments_are_the_longest_runs_within_one_stage_everywhere(data: st.DataObject, depth: int) -> None:
    layout = data.draw(layouts(depth))

    def stages_of(layer: int) -> list[int]:
        return [next(j for j, s in enumerate(p.stages) if s.start <= layer < s.stop) for p in layout.pipelines]

    runs: list[list[int]] = []
    for layer in range(depth):
        if runs and stages_of(runs[-1][0]) == stages_of(layer):
            runs[-1].append(layer)
        else:
            runs.append([layer])
    assert segments(layout) == tuple((run[0], run[-1] + 1) for run in runs)


@given(data=st.data(), model=models())
def test_each_box_is_summed_once_over_all_that_compute_it(data: st.DataObject, model: ModelShape) -> None:
    """For each parameter and part: one group, with everybody who holds that part, once, one pipeline after another."""
    layout = data.draw(layouts(model.depth))
    groups = sync_groups(layout, model)
    summed = Counter((name, group.part) for group in groups for name in group.params)
    names = {param.name for layer in model.layers for param in layer.params}
    assert summed == Counter({(name, tp): 1 for name in names for tp in range(layout.tensor)})

    for group in groups:
        assert len(set(group.members)) == len(group.members)
        for name in group.params:
            holders = {w for w in layout.members if holds(layout, model, w, name) and layout.places[w].tp == group.part}
            assert set(group.members) == holders
            assert len({box_of(layout, model, w, name) for w in group.members}) == 1
        pipelines = [layout.places[w].pipeline for w in group.members]
        assert pipelines == sorted(pipelines)
        assert set(pipelines) == set(range(len(layout.pipelines)))
    assert len({group.name for group in groups}) == len(groups)


def holds(layout: Layout, model: ModelShape, w: WorkerId, name: str) -> bool:
    shard = layout.shard(w)
    layers = model.layers[shard.start : shard.stop]
    return any(name in layer.ties or any(p.name == name for p in layer.params) for layer in layers)


def box_of(layout: Layout, model: ModelShape, w: WorkerId, name: str) -> Box:
    return next(box for param, box in layout.shard(w).boxes(model) if param.name == name)


@given(data=st.data(), depth=st.integers(1, 6))
def test_places_count_ranks_pipeline_by_pipeline(data: st.DataObject, depth: int) -> None:
    layout = data.draw(layouts(depth))
    check_layout(layout, depth, layout.micro_batches)
    assert [layout.places[w].rank for w in layout.members] == list(range(len(layout.members)))
    order = [(p.pipeline, p.stage, p.tp) for p in (layout.places[w] for w in layout.members)]
    assert order == sorted(order)
    for w in layout.members:
        place = layout.places[w]
        stage = layout.pipelines[place.pipeline].stages[place.stage]
        assert stage.members[place.tp] == w
        assert layout.shard(w) == Shard(stage.start, stage.stop, place.tp, layout.tensor)


def stage(start: int, stop: int, *members: int) -> Stage:
    return Stage(start, stop, tuple(worker(i) for i in members))


GOOD = Layout((Pipeline((stage(0, 2, 0), stage(2, 4, 1)), 0, 3), Pipeline((stage(0, 4, 2),), 3, 4)))


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        (Layout((replace(GOOD.pipelines[0], micro_start=1), GOOD.pipelines[1])), "begins at micro-batch 1, not 0"),
        (Layout((GOOD.pipelines[0], replace(GOOD.pipelines[1], micro_start=2))), "begins at micro-batch 2, not 3"),
        (Layout(GOOD.pipelines[:1]), "3 micro-batches, not 4"),
        (Layout((Pipeline((stage(0, 2, 0), stage(3, 4, 1)), 0, 4),)), "layers 3 to 4 after layer 2"),
        (Layout((Pipeline((stage(0, 4, 0), stage(4, 4, 1)), 0, 4),)), "layers 4 to 4 after layer 4"),
        (Layout((Pipeline((stage(0, 3, 0),), 0, 4),)), "ends at layer 3 of 4"),
        (Layout((Pipeline((stage(0, 2, 0, 1), stage(2, 4, 2)), 0, 4),)), "1 TP members, not 2"),
        (Layout((Pipeline((stage(0, 2, 0), stage(2, 4, 0)), 0, 4),)), "two places"),
    ],
)
def test_wrong_layouts_are_named(layout: Layout, message: str) -> None:
    check_layout(GOOD, 4, 4)
    with pytest.raises(ValueError, match=message):
        check_layout(layout, 4, 4)


def test_a_layer_that_no_worker_of_a_pipeline_has_is_no_shard() -> None:
    with pytest.raises(KeyError):
        GOOD.shard(worker(9))
