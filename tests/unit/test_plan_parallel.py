import pytest

from evenkeel.plan.hardware import Cluster, DeviceKind, Link, NodeKind
from evenkeel.plan.layout import Infeasible
from evenkeel.plan.parallel import Limits, choose, uniform
from evenkeel.plan.plans import Plan
from evenkeel.plan.workload import LayerWork, Workload

GIB = 2**30


def node(name: str, flops: float, devices: int = 1, memory: int = 80 * GIB, between: Link | None = None) -> NodeKind:
    device = DeviceKind(name, memory, {"bf16": flops}, 1e18, 1.0)
    return NodeKind(device, devices, Link(1e18), between or Link(1e18))


def blocks(layers: int, params: int = 1000, kept: int = 1000) -> Workload:
    """Equal layers of 1 s in all on a device of 1e12 FLOP/s, whose memory and links cost no time."""
    layer = LayerWork("block", 1e12 / 3, 2e12 / 3, params, params, kept, kept, 1, 0)
    return Workload((layer,) * layers, "bf16", 1, 1)


def plan(found: Plan | Infeasible) -> Plan:
    assert isinstance(found, Plan), found
    return found


@pytest.mark.parametrize(("fast", "slow", "ratio", "gain"), [(2, 2, 3.266, 2.133), (1, 3, 3.266, 1.566)])
def test_shares_by_speed_gain_what_the_closed_form_says(fast: int, slow: int, ratio: float, gain: float) -> None:
    """max(t) * mean(1 / t) of the device times over equal shares, at a depth of one."""
    cluster = Cluster(((node("fast", ratio * 1e12), fast), (node("slow", 1e12), slow)))
    work, limits = blocks(1), Limits(stages=1)
    shared = plan(choose(cluster, work, 4000, limits=limits))
    equal = plan(uniform(cluster, work, 4000, limits=limits))
    assert equal.step_s / shared.step_s == pytest.approx(gain, rel=0.01)
