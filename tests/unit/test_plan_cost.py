import random
from collections.abc import Sequence
from dataclasses import replace
from math import ceil, log2

import pytest

from evenkeel.plan.cost import (
    StageMemory,
    all_reduce_s,
    hierarchical_all_reduce_s,
    in_flight,
    layer_times,
    link_between,
    reduce_scatter_s,
    stage_memory,
)
from evenkeel.plan.hardware import DeviceKind, Link, NodeKind
from evenkeel.plan.schedule import Kind, one_f_one_b
from evenkeel.plan.workload import LayerTime, LayerWork, Profile, Workload

FAST = NodeKind(DeviceKind("fast", 80 * 2**30, {"bf16": 1e15}, 3e12, 0.5), 8, Link(4e11, 5e-6), Link(5e10, 1e-5))
SLOW = NodeKind(DeviceKind("slow", 40 * 2**30, {"bf16": 3e14}, 2e12, 0.5), 8, Link(2e11, 5e-6), Link(2e10, 2e-5))
LAYER = LayerWork("block", 2e12, 4e12, 1000, 900, 5000, 4000, 300, 600)
WORK = Workload((LAYER, replace(LAYER, name="head", kept_bytes=9000)), "bf16", 4096, 8)


def test_compute_is_divided_by_the_degree_and_sums_are_added() -> None:
    (first, _) = layer_times(WORK, FAST, 1)
    assert (first.forward_s, first.backward_s) == pytest.approx((2e12 / 5e14, 4e12 / 5e14))
    (first, _) = layer_times(WORK, FAST, 4)
    sums_s = all_reduce_s(600, 4, FAST.inside)
    assert (first.forward_s, first.backward_s) == pytest.approx((1e-3 + sums_s, 2e-3 + sums_s))


def test_tensor_sums_go_over_the_link_that_was_measured() -> None:
    link = Link(1e9, 1e-3)
    (first, _) = layer_times(WORK, FAST, 4, Profile(links={("fast", "fast", "inside"): link}))
    assert first.forward_s == pytest.approx(1e-3 + all_reduce_s(600, 4, link))


def test_memory_is_a_floor() -> None:
    """A layer without products (an embedding) takes the time to read and write what it must."""
    work = replace(WORK, layers=(replace(LAYER, forward_flops=0, backward_flops=0),))
    (only,) = layer_times(work, FAST, 1)
    assert only.forward_s == pytest.approx((2 * 1000 + 5000) / 3e12)
    assert only.backward_s == pytest.approx((2 * 1000 + 5000 + 2 * 4 * 1000) / 3e12)


def test_recomputation_adds_a_forward_pass_to_the_backward_pass() -> None:
    plain, again = layer_times(WORK, FAST, 2)[0], layer_times(replace(WORK, recompute=True), FAST, 2)[0]
    assert again.forward_s == plain.forward_s
    assert again.backward_s == pytest.approx(plain.backward_s + plain.forward_s)


def test_measured_times_are_believed_and_scaled_to_other_degrees() -> None:
    measured = (LayerTime(1.0, 2.0), LayerTime(3.0, 5.0))
    profile = Profile({("fast", 2): measured})
    assert layer_times(WORK, FAST, 2, profile) == measured
    assert layer_times(WORK, SLOW, 2, profile) == layer_times(WORK, SLOW, 2)
    counted, at_two = layer_times(WORK, FAST, 8), layer_times(WORK, FAST, 2)
    for scaled, c, m, t in zip(layer_times(WORK, FAST, 8, profile), counted, measured, at_two, strict=True):
        assert scaled.total_s == pytest.approx(c.total_s * m.total_s / t.total_s)


def test_what_is_wrong_is_named() -> None:
    with pytest.raises(ValueError, match=r"'fast' has no flops for train.precision fp64; it has: bf16"):
        layer_times(replace(WORK, precision="fp64"), FAST, 1)
    with pytest.raises(ValueError, match="profile of 'fast' is not of this model"):
        layer_times(WORK, FAST, 1, Profile({("fast", 4): (LayerTime(1, 1),)}))


def simulated_ring_s(size: float, members: int, link: Link) -> tuple[float, int]:
    """Passes parts around a ring until everybody has all sums; each has the parts as sets of whom they count."""
    parts = [[frozenset({m}) for _ in range(members)] for m in range(members)]
    whole = frozenset(range(members))
    seconds, turns = 0.0, 0
    while any(part != whole for held in parts for part in held):
        sent = [(m, (m - turns) % members, parts[m][(m - turns) % members]) for m in range(members)]
        for m, index, part in sent:
            parts[(m + 1) % members][index] |= part
        seconds += link.latency_s + size / members / link.bytes_per_s
        turns += 1
    return seconds, turns


@pytest.mark.parametrize("members", [2, 3, 4, 8])
def test_a_ring_takes_as_long_as_its_turns(members: int) -> None:
    link = Link(1e9, 1e-5)
    seconds, turns = simulated_ring_s(1e6, members, link)
    assert turns == 2 * (members - 1)
    assert 2 * reduce_scatter_s(1e6, members, link) == pytest.approx(seconds)
    assert all_reduce_s(1e6, members, link) <= seconds * (1 + 1e-12)


def test_small_sums_of_many_go_by_trees() -> None:
    link = Link(1e9, 1e-5)
    assert all_reduce_s(8, 1024, link) == pytest.approx(2 * log2(1024) * 1e-5, rel=1e-3)
    assert all_reduce_s(1e9, 8, link) == pytest.approx(2 * 7 / 8, rel=1e-3)
    assert all_reduce_s(1e9, 1, link) == 0


def test_a_sum_by_nodes_uses_all_their_links() -> None:
    flat = all_reduce_s(1e9, 64, FAST.between)
    layered = hierarchical_all_reduce_s(1e9, 8, 8, FAST.inside, FAST.between)
    assert layered == pytest.approx(2 * 7 / 8 * 1e9 / 4e11 + 2 * 7 / 8 * 1e9 / 8 / 5e10, rel=0.05)
    assert layered < flat / 4


def test_a_link_is_the_slower_of_two_or_what_was_measured() -> None:
    assert link_between(FAST, SLOW, "between") == Link(2e10, 2e-5)
    measured = Link(1.0, 2.0)
    profile = Profile(links={("fast", "slow", "between"): measured})
    assert link_between(SLOW, FAST, "between", profile) == link_between(FAST, SLOW, "between", profile) == measured
    assert link_between(FAST, FAST, "inside", profile) == FAST.inside


def most_in_flight(stage: int, stages: int, share: int) -> int:
    flying, most = 0, 0
    for action in one_f_one_b(stage, stages, share):
        flying += 1 if action.kind is Kind.FORWARD else -1
        most = max(most, flying)
    return most


def test_in_flight_is_what_the_schedule_does() -> None:
    for stages in range(1, 6):
        for stage in range(stages):
            for share in range(8):
                assert in_flight(stage, stages, share) == most_in_flight(stage, stages, share)


def dumb_bytes(layers: Sequence[LayerWork], tensor: int, flying: int, owned: float) -> StageMemory:
    params = sum(x.params - x.split_params + ceil(x.split_params / tensor) for x in layers)
    kept = sum(x.kept_bytes - x.split_kept_bytes + ceil(x.split_kept_bytes / tensor) for x in layers)
    return StageMemory(2 * params, 4 * params, ceil(12 * params * owned), flying * kept)


def test_memory_of_a_stage() -> None:
    rng = random.Random(1)
    for _ in range(50):
        layers = tuple(
            replace(LAYER, params=p, split_params=rng.randint(0, p), kept_bytes=k, split_kept_bytes=rng.randint(0, k))
            for p, k in ((rng.randint(0, 999), rng.randint(0, 999)) for _ in range(5))
        )
        work = replace(WORK, layers=layers)
        start, stop = sorted(rng.sample(range(6), 2))
        tensor, flying, owned = rng.choice([1, 2, 8]), rng.randint(0, 4), rng.random()
        assert stage_memory(work, (start, stop), tensor, flying, owned) == dumb_bytes(
            layers[start:stop], tensor, flying, owned
        )


def test_recomputation_holds_what_enters_a_layer_and_one_layers_work() -> None:
    work = replace(WORK, recompute=True)
    assert stage_memory(work, (0, 2), 1, 3, 1.0).activations == 3 * (0 + 300) + 9000
    assert stage_memory(work, (1, 2), 1, 3, 1.0).activations == 3 * 300 + 9000
    assert stage_memory(work, (0, 2), 4, 3, 1.0).activations == 3 * 300 + 9000 - 4000 + 1000
