"""Small settings of the simulator of days, for its tests."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from random import Random

from evenkeel.core.model import LayerShape, ModelShape, ParamShape
from evenkeel.sim.goodput.costs import Costs
from evenkeel.sim.goodput.outages import Drawn, Repair
from evenkeel.sim.goodput.setting import Change, Setting

COSTS = Costs(
    detect_s=2.0,
    abort_s=1.0,
    settle_s=0.5,
    plan_s=0.5,
    regroup_s=4.0,
    reshard_s=2.0,
    first_step_s=3.0,
    start_s=20.0,
    restore_s=10.0,
    save_stall_s=2.0,
    save_write_s=15.0,
    mirror_stall_s=0.5,
    mirror_send_s=3.0,
)


@dataclass(frozen=True)
class Told:
    """Changes as they are written here."""

    told: tuple[Change, ...]

    def changes(self, nodes: Sequence[str], seed: int, until_s: float) -> Iterator[Change]:
        return iter(self.told)


def model(layers: int) -> ModelShape:
    return ModelShape(tuple(LayerShape(f"layer{i}", (ParamShape(f"weight{i}", (4096,)),)) for i in range(layers)))


def setting(nodes: int, told: Sequence[tuple[float, int, bool]] = (), **other: object) -> Setting:
    """One worker a node, each a pipeline; steps of 10 s for an hour. `told` are (second, node, whether it comes)."""
    names = tuple(f"node{i}" for i in range(nodes))
    changes = Told(tuple(Change(at_s, f"node{i}", there) for at_s, i, there in told))
    usual: dict[str, object] = {
        "nodes": names,
        "devices_per_node": 1,
        "model": model(4),
        "data": nodes,
        "pipeline": 1,
        "tensor": 1,
        "micro_batches": 12,
        "step_s": 10.0,
        "tokens_per_step": 1000.0,
        "duration_s": 3600.0,
        "failures": changes,
        "costs": COSTS,
        "checkpoint_every": 30,
    }
    return Setting(**(usual | other))  # type: ignore[arg-type]


def random_setting(seed: int) -> Setting:
    random = Random(seed)
    data, pipeline, tensor = random.choice([(4, 1, 1), (2, 2, 1), (1, 4, 1), (3, 2, 2), (2, 2, 2)])
    per_node = random.choice([1, 2]) * tensor
    nodes = data * pipeline * tensor // per_node + random.choice([0, 1, 2])
    return replace(
        setting(nodes),
        devices_per_node=per_node,
        data=data,
        pipeline=pipeline,
        tensor=tensor,
        model=replace(model(6), tensor_divides=2),
        failures=Drawn(random.choice([30.0, 100.0]), Repair(random.choice([60.0, 1500.0]))),
        spares=random.choice([0, 1]),
        copies=random.choice([None, 1, 2]),
        mirror_every=random.choice([0, 7]),
        checkpoint_every=random.choice([0, 13, 40, None]),
        duration_s=10_000.0,
        seed=seed,
        per_node=random.choice([False, True]),
    )
