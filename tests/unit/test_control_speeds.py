"""What the controller makes of measured times: averages that noise does not move, and paces that explain them."""

from random import Random
from statistics import mean, median, pstdev

import pytest
from hypothesis import given
from hypothesis import strategies as st

from evenkeel.control.speeds import SAMPLES, SLOW_LINK, Average, Tracker
from evenkeel.core.ids import WorkerId
from evenkeel.core.layout import Layout, Pipeline, Stage
from evenkeel.core.vote import Timing

A, B, C = WorkerId("a"), WorkerId("b"), WorkerId("c")


def column(*stages: tuple[int, int, WorkerId]) -> Layout:
    return Layout((Pipeline(tuple(Stage(start, stop, (worker,)) for start, stop, worker in stages), 0, 4),))


def timing(worker: WorkerId, *layers: float, receive_s: float = 0.0) -> Timing:
    return Timing(worker, sum(layers), receive_s, layers)


@pytest.mark.parametrize("odd", range(1, SAMPLES))
def test_a_moment_changes_nothing(odd: int) -> None:
    average = Average()
    for sample in [1.0] * SAMPLES + [5.0] * odd + [1.0]:
        average.add(sample)
    assert average.value == 1.0


def test_another_speed_counts_after_some_samples() -> None:
    average = Average()
    for sample in [1.0] * 5 + [4.0, 9.0, 4.2]:
        average.add(sample)
    assert average.value == 4.2


@given(st.lists(st.booleans(), min_size=1, max_size=40))
def test_what_is_off_on_both_sides_in_turn_changes_nothing(sides: list[bool]) -> None:
    average = Average(1.0)
    in_a_row, before = 0, None
    for side in sides:
        in_a_row, before = (in_a_row + 1 if side == before else 1), side
        if in_a_row == SAMPLES:
            return
        average.add(2.0 if side else 0.5)
        assert average.value == 1.0


def test_noise_is_averaged() -> None:
    """It moves by less than half as much as its samples."""
    rng, average, values = Random(1), Average(), []
    for _ in range(2000):
        average.add(rng.gauss(1.0, 0.05))
        values.append(average.value)
    assert mean(values[100:]) == pytest.approx(1.0, abs=0.005)
    assert pstdev(values[100:]) < 0.025


def heard(tracker: Tracker, *timings: Timing) -> Tracker:
    for _ in range(SAMPLES):
        tracker.heard(timings)
    return tracker


def test_a_slow_worker_and_a_cost_that_the_model_has_wrong() -> None:
    """The second stage's last layer takes three times what the model says; that does not make its worker slow."""
    tracker = Tracker((1.0,) * 4 + (1.0,))
    tracker.opened(column((0, 2, A), (2, 5, B)))
    speeds = heard(tracker, timing(A, 4.0, 4.0), timing(B, 1.0, 1.0, 3.0)).speeds()
    assert speeds.costs == pytest.approx((1, 1, 1, 1, 3))
    assert speeds.paces == pytest.approx({A: 4.0, B: 1.0})


def test_nothing_is_known_before_some_samples() -> None:
    tracker = Tracker((1.0, 1.0))
    tracker.opened(column((0, 2, A)))
    tracker.heard([timing(A, 1.0, 1.0)])
    assert tracker.speeds().paces == {}


@given(
    costs=st.lists(st.floats(0.1, 10.0), min_size=4, max_size=4),
    paces=st.lists(st.floats(0.1, 10.0), min_size=3, max_size=3),
)
def test_the_product_of_pace_and_cost_is_what_was_measured(costs: list[float], paces: list[float]) -> None:
    """Whatever the costs by the model are, the times of the layers where they are come out as measured."""
    tracker = Tracker((1.0, 2.0, 1.0, 1.0))
    tracker.opened(column((0, 1, A), (1, 3, B), (3, 4, C)))
    a, b, c = (
        [pace * cost for cost in part] for pace, part in zip(paces, (costs[:1], costs[1:3], costs[3:]), strict=True)
    )
    speeds = heard(tracker, timing(A, *a), timing(B, *b), timing(C, *c)).speeds()
    told = [speeds.paces[w] * cost for w, cost in zip((A, B, B, C), speeds.costs, strict=True)]
    assert told == pytest.approx([*a, *b, *c])


def test_who_has_another_stage_is_expected_to_be_as_fast_there() -> None:
    tracker = Tracker((1.0,) * 4)
    tracker.opened(column((0, 2, A), (2, 4, B)))
    heard(tracker, timing(A, 1.0, 1.0), timing(B, 3.0, 3.0))
    tracker.opened(column((0, 3, A), (3, 4, B)))
    assert tracker.speeds().paces == pytest.approx({A: 1.0, B: 3.0})
    tracker.heard([timing(A, 5.0, 5.0, 5.0)])
    assert tracker.speeds().paces == pytest.approx({A: 1.0, B: 3.0})
    tracker.lost(B)
    assert tracker.speeds().paces == pytest.approx({A: 1.0})


def test_a_slow_link_is_told_once() -> None:
    tracker = Tracker((1.0,) * 3)
    tracker.opened(column((0, 1, A), (1, 2, B), (2, 3, C)))
    nodes = {A: "n1", B: "n1", C: "n1"}

    def link(source: WorkerId, worker: WorkerId, rate: float) -> Timing:
        return Timing(worker, source=source, bytes_per_s=rate)

    heard(tracker, link(A, B, 1e9), link(B, C, 1e9))
    assert tracker.slow_links(nodes) == []
    tracker.heard([link(B, C, 1e8)])
    assert tracker.slow_links(nodes) == []
    heard(tracker, link(B, C, 1e8))
    assert tracker.slow_links(nodes) == [(B, C, 1e8, 1e9)]
    assert tracker.slow_links(nodes) == []
    heard(tracker, link(B, C, 9e8))
    assert tracker.slow_links(nodes) == []
    heard(tracker, link(B, C, 1e8))
    assert tracker.slow_links(nodes) == [(B, C, 1e8, 1e9)]


@given(st.data())
def test_slow_links_are_those_that_a_dumb_search_finds(data: st.DataObject) -> None:
    """Each link against the median of all links that, like it, are within a node or between nodes."""
    workers = [WorkerId(f"w{i}") for i in range(5)]
    nodes = {worker: data.draw(st.sampled_from("xy")) for worker in workers}
    pairs = data.draw(st.lists(st.sampled_from([(a, b) for a in workers for b in workers if a != b]), unique=True))
    tracker = Tracker((1.0,))
    for pair in pairs:
        tracker.best[pair] = data.draw(st.floats(1.0, 1e9))
        tracker.rates[pair] = Average(data.draw(st.one_of(st.none(), st.floats(1.0, tracker.best[pair]))))
    expected = []
    for source, worker in pairs:
        inside = nodes[source] == nodes[worker]
        usual = median(rate for (a, b), rate in tracker.best.items() if (nodes[a] == nodes[b]) == inside)
        value = tracker.rates[source, worker].value
        if value is not None and value * SLOW_LINK <= usual:
            expected.append((source, worker, value, usual))
    assert tracker.slow_links(nodes) == expected
    assert tracker.slow_links(nodes) == []  # they were told


def test_what_was_measured_elsewhere_is_remembered() -> None:
    """A stage of one layer for which the model has no cost: nothing else tells a slow worker from a dear layer."""
    tracker = Tracker((0.0, 1.0, 1.0, 1.0))
    tracker.opened(column((0, 2, A), (2, 4, B)))
    heard(tracker, timing(A, 0.4, 4.0), timing(B, 1.0, 1.0))
    tracker.opened(column((0, 1, A), (1, 4, B)))
    speeds = heard(tracker, timing(A, 0.4), timing(B, 1.0, 1.0, 1.0)).speeds()
    assert speeds.costs == pytest.approx((0.1, 1, 1, 1))
    assert speeds.paces == pytest.approx({A: 4.0, B: 1.0})
