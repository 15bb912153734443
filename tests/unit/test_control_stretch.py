"""Many steps in one report, against the same steps taken down one by one."""

from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from random import Random

import pytest

from evenkeel.control import messages as m
from evenkeel.control import progress
from evenkeel.control.controller import Controller
from evenkeel.control.modes import Running
from evenkeel.control.policy import Policy
from evenkeel.core.ids import NodeId, WorkerId
from evenkeel.core.layout import WorkerInfo
from evenkeel.core.model import LayerShape, ModelShape, ParamShape
from evenkeel.core.vote import SLOTS, Difference, Flags, Slot, Vote
from evenkeel.plan.layout import Wish
from evenkeel.sim.snapshot import clone, freeze

MODEL = ModelShape(tuple(LayerShape(f"l{i}", (ParamShape(f"p{i}", (4, 4), 0),)) for i in range(4)), 4)
POLICY = Policy(MODEL, Wish(2, 1, 1, 1, 2), 12, 10**6, checkpoint_every=0, gather_s=5.0)
RARE = (Slot.NONFINITE, Slot.PAUSE, Slot.CHECKPOINT, Slot.STOP, Slot.EVAL_TOKENS, Slot.BUSY, Slot.MIRROR)


def running(policy: Policy) -> Controller:
    """With a world that has joined, and has committed nothing."""
    controller = Controller(policy)
    ready = [m.WorkerReady(WorkerInfo(WorkerId(f"w{i}"), NodeId(f"n{i}"), i)) for i in range(2)]
    outputs = controller.several(0.0, [m.Started(), *ready])
    forms = [command for output in outputs for command in output.commands if isinstance(command, m.Form)]
    controller.several(1.0, [m.Joined(form.worker_id, form.world.generation) for form in forms])
    assert isinstance(controller.mode, Running)
    return controller


def reports(rng: Random, controller: Controller) -> Iterator[m.Report]:
    """Steps from the next one on; rarely one of which something follows, that is missing, or that is old."""
    assert isinstance(controller.mode, Running)
    step, generation = controller._state.visible, controller.mode.world.generation
    for _ in range(rng.randint(1, 30)):
        step += rng.choices([1, 0, 2], [100, 2, 1])[0]
        values = [0.0] * SLOTS
        values[Slot.TOKENS] = float(rng.random() > 0.01)
        for slot in RARE:
            values[slot] = float(rng.random() < 0.01)
        vote = Vote(generation - (rng.random() < 0.01), step, tuple(values))
        if rng.random() < 0.005:
            vote = replace(vote, differences=(Difference("part", ()),))
        yield m.Report(vote, rng.random())


@pytest.mark.parametrize("seed", range(40))
def test_it_is_as_one_by_one(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = Random(seed)
    controller = running(replace(POLICY, max_bad_steps=2))
    now, stretch, taken = 1.0, progress._stretch, 0
    for _ in range(40):
        if not isinstance(controller.mode, Running):
            controller = running(replace(POLICY, max_bad_steps=2))
            now = 1.0
        assert isinstance(controller.mode, Running)
        now += rng.choice([0.0, 1.0, 50.0])
        told = m.Reported(controller.mode.world.leader, tuple(reports(rng, controller)))
        taken += stretch(clone(controller._state), now, told.reports, 0.1)
        one_by_one = Controller(POLICY)
        one_by_one._state = clone(controller._state)
        monkeypatch.setattr(progress, "_stretch", lambda *_: 0)
        expected = one_by_one.step(now, told)
        monkeypatch.setattr(progress, "_stretch", stretch)
        assert controller.step(now, told) == expected
        assert freeze(controller._state) == freeze(one_by_one._state)
        assert controller._state.worker_seconds == one_by_one._state.worker_seconds
    assert taken > 30


def test_what_a_vote_says_is_what_its_flags_say() -> None:
    for said in product((0.0, 2.0), repeat=len(RARE)):
        values = [0.0] * SLOTS
        values[Slot.TOKENS] = 1.0
        for slot, value in zip(RARE, said, strict=True):
            values[slot] = value
        vote = Vote(1, 1, tuple(values))
        assert vote.saves == (Flags.CHECKPOINT in vote.flags)
        assert vote.leaves == bool(vote.flags & (Flags.PAUSE | Flags.STOP))
        if vote.uneventful:
            assert not (vote.flags or vote.skip or vote.saves or vote.leaves or vote.eval_loss is not None)
    assert not Vote(1, 1, (0.0,) * SLOTS).uneventful
    values[:] = [0.0] * SLOTS
    values[Slot.TOKENS] = 1.0
    assert Vote(1, 1, tuple(values)).uneventful
    assert not Vote(1, 1, tuple(values), (Difference("part", ()),)).uneventful
