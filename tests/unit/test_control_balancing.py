"""What the controller makes of a world's steps when it changes its layout, beside what the scripts show."""

import pytest

from evenkeel.control import balancing
from evenkeel.control.controller import Controller
from evenkeel.control.policy import Policy
from evenkeel.control.state import State
from evenkeel.core.ids import INITIAL, NodeId, WorkerId
from evenkeel.core.layout import Layout, Pipeline, Stage, WorkerInfo
from evenkeel.core.model import LayerShape, ModelShape, ParamShape
from evenkeel.core.world import World
from evenkeel.plan.balance import Rebalance
from evenkeel.plan.layout import Wish

MODEL = ModelShape(tuple(LayerShape(f"block{i}", (ParamShape(f"block{i}", (4, 4), 0),)) for i in range(4)))


def state(mirror_every: int = 0, copies: int | None = None) -> State:
    wish = Wish(data=3, pipeline=2, tensor=1, min_workers=1, max_workers=6)
    policy = Policy(MODEL, wish, 6, last_step=50, rebalance=True, mirror_every=mirror_every, copies=copies)
    s = Controller(policy)._state
    for i in range(6):
        s.roster.add(WorkerInfo(WorkerId(f"w{i}"), NodeId(f"n{i}"), pid=100 + i))
    return s


def world(pipelines: int, generation: int = 1, depth: int = 2) -> World:
    stages = [[(4 * j // depth, 4 * (j + 1) // depth, i * depth + j) for j in range(depth)] for i in range(pipelines)]
    layout = Layout(
        tuple(
            Pipeline(tuple(Stage(a, b, (WorkerId(f"w{n}"),)) for a, b, n in row), i, i + 1)
            for i, row in enumerate(stages)
        )
    )
    infos = tuple(WorkerInfo(w, NodeId(f"n{w[1:]}"), 100) for w in layout.members)
    nodes = tuple((info.worker_id, info.node_id) for info in infos)
    return World(generation, layout, INITIAL, infos, (), nodes, last_step=50, cause="start", reason="")


def test_what_a_step_took_is_of_the_world_that_is_changed() -> None:
    s = state()
    balancing.opened(s, world(3))
    for _ in range(balancing.JUDGED):
        balancing.committed(s, 5.0)
    balancing.opened(s, world(2, generation=2))
    for _ in range(2):
        balancing.committed(s, 1.0)
    b = balancing.balance_of(s)
    after = world(3, generation=3)
    b.wanted = Rebalance("shares", after.layout, 2.0, 1.0, "")
    balancing.opened(s, after)
    assert b.judged is not None
    assert b.judged.before_s == 1.0
    assert b.step_s == 0.0


@pytest.mark.parametrize(
    ("copies", "mirror_every", "before", "after", "may"),
    [
        (None, 0, 3, 2, True),
        (None, 0, 2, 1, False),
        (None, 2, 2, 1, True),
        (None, 0, 1, 1, True),
        (3, 0, 3, 2, False),
        (2, 0, 3, 2, True),
        (1, 0, 2, 1, True),
    ],
)
def test_how_often_state_is_kept_is_not_lowered(
    copies: int | None, mirror_every: int, before: int, after: int, may: bool
) -> None:
    s = state(mirror_every, copies)
    assert balancing._has_copies(s, world(before), world(after).layout) is may


def test_a_single_worker_has_nobody_to_mirror_it() -> None:
    s = state(mirror_every=2)
    assert not balancing._has_copies(s, world(2, depth=1), world(1, depth=1).layout)
