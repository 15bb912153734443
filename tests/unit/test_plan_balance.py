"""Whether and what moves: predictions against trying all, thresholds, memory, and words."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import combinations, pairwise, product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evenkeel.core.ids import NodeId, WorkerId
from evenkeel.core.layout import Layout, Pipeline, Stage, WorkerInfo, check_layout
from evenkeel.core.model import LayerShape, ModelShape, ParamShape
from evenkeel.plan.balance import Keep, Rebalance, Situation, decide
from evenkeel.plan.layout import Infeasible, Planned, Wish, plan_layout
from evenkeel.plan.memory import Uses, fits, stage_fits
from evenkeel.plan.speeds import MIN_GAIN, Speeds, anything, recut_by

DEPTH = 6
MODEL = ModelShape(tuple(LayerShape(f"l{i}", (ParamShape(f"p{i}", (8, 8)),)) for i in range(DEPTH)))


def info(i: int, kind: str = "cpu", memory: int = 0) -> WorkerInfo:
    return WorkerInfo(WorkerId(f"w{i}"), NodeId(f"n{i}"), i, "cuda", kind, memory)


def layout_of(data: int, pipeline: int, micro_batches: int) -> Layout:
    wish = Wish(data, pipeline, 1, 1, data * pipeline)
    planned = plan_layout([info(i) for i in range(data * pipeline)], wish, MODEL, micro_batches, None)
    assert isinstance(planned, Planned)
    return planned.layout


def speeds_of(layout: Layout, paces: Sequence[float], costs: Sequence[float] = (1.0,) * DEPTH) -> Speeds:
    return Speeds(tuple(costs), dict(zip(layout.members, paces, strict=True)))


def situation(layout: Layout, speeds: Speeds, least: int = 1, spares: Sequence[WorkerInfo] = ()) -> Situation:
    size = len(layout.members)
    wish = Wish(len(layout.pipelines), len(layout.pipelines[0].stages), 1, least, size)
    infos = (*(info(int(worker[1:])) for worker in layout.members), *spares)
    return Situation(
        workers=infos,
        steps_left=1000,
        pause_s=1.0,
        stage_fits=anything,
        fits=lambda _: True,
        without=lambda workers: plan_layout(workers, wish, MODEL, layout.micro_batches, layout, speeds),
    )


def decided(layout: Layout, speeds: Speeds, **changes: object) -> Keep | Rebalance:
    return decide(layout, speeds, replace(situation(layout, speeds), **changes))  # type: ignore[arg-type]


def all_layouts(layout: Layout) -> list[Layout]:
    """Every choice of cuts and shares with the same workers in the same places."""
    stages, count = len(layout.pipelines[0].stages), len(layout.pipelines)
    cuts = [tuple(pairwise((0, *inner, DEPTH))) for inner in combinations(range(1, DEPTH), stages - 1)]
    bounds = list(combinations(range(1, layout.micro_batches), count - 1))
    found = []
    for chosen, inner in product(product(cuts, repeat=count), bounds):
        borders = pairwise((0, *inner, layout.micro_batches))
        pipelines = tuple(
            Pipeline(tuple(Stage(*c, s.members) for c, s in zip(cut, p.stages, strict=True)), *border)
            for p, cut, border in zip(layout.pipelines, chosen, borders, strict=True)
        )
        found.append(Layout(pipelines))
    return found


pace = st.sampled_from([0.1, 0.1, 0.11, 0.2, 0.4])


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_no_shares_are_faster_and_cuts_are_near_the_best(data: st.DataObject) -> None:
    """Cuts are chosen for the slowest stage, so that the bubble may be longer than it must."""
    layout = layout_of(*data.draw(st.sampled_from([(2, 1), (3, 1), (1, 2), (2, 2), (1, 3)])), 8)
    paces = [data.draw(pace) for _ in layout.members]
    costs = [data.draw(st.sampled_from([0.5, 1.0, 2.0])) for _ in range(DEPTH)]
    speeds = speeds_of(layout, paces, costs)
    everything = all_layouts(layout)
    same_cuts = [x for x in everything if [p.stages for p in x.pipelines] == [p.stages for p in layout.pipelines]]
    shared, recut = speeds.shared(layout), recut_by(layout, speeds)
    for changed in (shared, recut):
        check_layout(changed, DEPTH, 8)
    assert speeds.finish_s(shared) == pytest.approx(min(map(speeds.finish_s, same_cuts)))
    best = min(map(speeds.finish_s, everything))
    assert best <= speeds.finish_s(recut) * (1 + 1e-9)
    assert speeds.finish_s(recut) <= 1.25 * best


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_a_change_is_faster_by_enough_and_keeps_everybody_useful(data: st.DataObject) -> None:
    layout = layout_of(*data.draw(st.sampled_from([(2, 1), (3, 1), (1, 2), (2, 2), (1, 3)])), 12)
    speeds = speeds_of(layout, [data.draw(pace) for _ in layout.members])
    decision = decided(layout, speeds)
    now_s = speeds.finish_s(layout)
    if isinstance(decision, Keep):
        assert speeds.finish_s(speeds.shared(layout)) > (1 - MIN_GAIN) * now_s * (1 - 1e-9)
        return
    check_layout(decision.layout, DEPTH, 12)
    assert decision.now_s == pytest.approx(now_s)
    assert decision.then_s == pytest.approx(speeds.finish_s(decision.layout))
    assert decision.gain_s >= MIN_GAIN * now_s * (1 - 1e-9)
    assert (set(decision.layout.members) == set(layout.members)) == (not decision.out)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.floats(0.97, 1.03), min_size=4, max_size=4), st.sampled_from([(4, 1), (2, 2), (1, 4)]))
def test_equal_workers_keep_equal_work(paces: list[float], shape: tuple[int, int]) -> None:
    if shape[1] == 4:  # six layers in four stages: one with two layers of twice the time is as even as it can be
        paces = [1.0] * 4
    layout = layout_of(*shape, 32)
    assert isinstance(decided(layout, speeds_of(layout, paces)), Keep)


def test_shares_come_before_cuts() -> None:
    """One pipeline is slow in both stages: fewer micro-batches do as well as other cuts."""
    layout = layout_of(2, 2, 12)
    decision = decided(layout, speeds_of(layout, [1, 1, 3, 3]))
    assert isinstance(decision, Rebalance)
    assert decision.what == "shares"
    assert [p.share for p in decision.layout.pipelines] == [10, 2]


def test_a_slow_stage_gives_up_layers() -> None:
    layout = layout_of(1, 2, 12)
    decision = decided(layout, speeds_of(layout, [1, 2]))
    assert isinstance(decision, Rebalance)
    assert decision.what == "cuts"
    assert [(s.start, s.stop) for s in decision.layout.pipelines[0].stages] == [(0, 4), (4, 6)]
    assert decision.reason == (
        "w1 takes 2.00 times as long as w0: pipeline 0 in 4 + 2 layers instead of 3 + 3, "
        "52 s of passes a step instead of 75"
    )


def test_a_change_must_pay_for_the_pause() -> None:
    layout = layout_of(2, 1, 10)
    speeds = speeds_of(layout, [0.1, 0.4])
    gain = decided(layout, speeds)
    assert isinstance(gain, Rebalance)
    kept = decided(layout, speeds, steps_left=3, pause_s=3 * gain.gain_s)
    assert isinstance(kept, Keep)
    assert "the pause costs" in kept.reason
    assert isinstance(decided(layout, speeds, steps_left=4, pause_s=3 * gain.gain_s), Rebalance)
    assert isinstance(decided(layout, speeds, min_gain=0.8), Keep)


def test_who_was_not_measured_is_not_judged() -> None:
    layout = layout_of(2, 1, 10)
    decision = decided(layout, Speeds((1.0,) * DEPTH, {WorkerId("w0"): 0.1}))
    assert decision == Keep("not measured yet: w1")


def test_only_a_useless_worker_is_evicted() -> None:
    layout = layout_of(3, 1, 9)
    slow = decided(layout, speeds_of(layout, [0.1, 0.1, 0.3]))
    assert isinstance(slow, Rebalance)
    assert slow.what == "shares"
    useless = decided(layout, speeds_of(layout, [0.1, 0.1, 2.0]))
    assert isinstance(useless, Rebalance)
    assert (useless.what, useless.out) == ("eviction", ("w2",))
    assert [p.share for p in useless.layout.pipelines] == [5, 4]
    needed = replace(situation(layout, speeds_of(layout, [0.1, 0.1, 2.0])), without=lambda _: Infeasible("too few"))
    kept = decide(layout, speeds_of(layout, [0.1, 0.1, 2.0]), needed)
    assert isinstance(kept, Rebalance)
    assert [p.share for p in kept.layout.pipelines] == [4, 4, 1]


def test_a_spare_takes_the_place_of_a_slow_worker() -> None:
    layout = layout_of(1, 2, 10)
    speeds = speeds_of(layout, [0.1, 1.0])
    at = situation(layout, speeds, spares=[info(7)])
    # Of its kind one is fast and one slow, so that it is expected to be between them.
    decision = decide(layout, speeds, at)
    assert isinstance(decision, Rebalance)
    known = replace(speeds, paces={**speeds.paces, WorkerId("w7"): 0.1})
    at = replace(at, without=lambda workers: plan_layout(workers, Wish(1, 2, 1, 1, 2), MODEL, 10, layout, known))
    decision = decide(layout, known, at)
    assert isinstance(decision, Rebalance)
    assert (decision.what, decision.layout.members) == ("eviction", ("w0", "w7"))
    assert "w7 takes its place" in decision.reason


def test_memory_limits_are_hard() -> None:
    """Each layer's state takes 1 KiB: 256 bytes of parameters, as much of gradients, twice that of the optimizer."""
    layout = layout_of(1, 2, 12)
    speeds = speeds_of(layout, [1, 4])
    small = [info(0, memory=int(4.5 * 1024 / 0.8)), info(1, memory=10**6)]
    within = stage_fits(layout, MODEL, small, "fp32", None)
    assert recut_by(layout, speeds, within).pipelines[0].stages[0].stop == 4
    assert recut_by(layout, speeds).pipelines[0].stages[0].stop == 5
    assert fits(recut_by(layout, speeds, within), MODEL, small, "fp32", Uses(), None)
    assert not fits(recut_by(layout, speeds), MODEL, small, "fp32", Uses(), None)


def test_a_slow_link_is_no_slow_worker() -> None:
    layout = layout_of(2, 2, 12)
    speeds = replace(speeds_of(layout, [1, 1, 1, 1]), receives={WorkerId("w3"): 9.0})
    decision = decided(layout, speeds)
    assert isinstance(decision, Rebalance)
    assert decision.what == "shares"
    assert decision.reason.startswith("the link between w2 and w3 is slower than their stages: 9 + 3")


def test_a_layout_keeps_its_shape_when_somebody_is_replaced() -> None:
    layout = recut_by(layout_of(2, 2, 12), speeds_of(layout_of(2, 2, 12), [1, 1, 1, 3]))
    workers = [info(0), info(9), info(2), info(3)]
    planned = plan_layout(workers, Wish(2, 2, 1, 1, 4), MODEL, 12, layout, Speeds((1.0,) * DEPTH))
    assert isinstance(planned, Planned)
    assert planned.layout.members == ("w0", "w9", "w2", "w3")
    assert [(p.share, [s.stop for s in p.stages]) for p in planned.layout.pipelines] == [
        (p.share, [s.stop for s in p.stages]) for p in layout.pipelines
    ]


def test_who_joins_gets_a_share_by_what_is_known() -> None:
    """Of a kind of device whose speed is known; of an unknown one it is taken for the mean."""
    layout = layout_of(2, 1, 12)
    speeds = Speeds((1.0,) * DEPTH, {WorkerId("w0"): 1.0, WorkerId("w1"): 4.0})
    workers = [info(0, "fast"), info(1, "slow"), info(2, "fast")]
    planned = plan_layout(workers, Wish(3, 1, 1, 1, 3), MODEL, 12, layout, speeds)
    assert isinstance(planned, Planned)
    assert [p.share for p in planned.layout.pipelines] == [6, 1, 5]
    unknown = plan_layout(workers, Wish(3, 1, 1, 1, 3), MODEL, 12, layout, Speeds((1.0,) * DEPTH))
    assert isinstance(unknown, Planned)
    assert [p.share for p in unknown.layout.pipelines] == [4, 4, 4]
