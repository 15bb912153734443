"""Events that are heard at once, against the same events one after the other."""

from collections.abc import Iterator, Sequence
from copy import copy
from dataclasses import replace
from random import Random

import pytest

from evenkeel.control import forming
from evenkeel.control import messages as m
from evenkeel.control.controller import Controller
from evenkeel.control.modes import Gathering, Running
from evenkeel.control.policy import Policy
from evenkeel.core.ids import NodeId, Version, WorkerId
from evenkeel.core.layout import WorkerInfo
from evenkeel.core.model import LayerShape, ModelShape, ParamShape
from evenkeel.core.vote import SLOTS, Flags, Slot, Vote
from evenkeel.plan.layout import Wish
from evenkeel.sim.snapshot import clone, freeze

MODEL = ModelShape(tuple(LayerShape(f"l{i}", (ParamShape(f"p{i}", (4, 4), 0),)) for i in range(4)), 4)
POLICY = Policy(MODEL, Wish(3, 2, 1, 1, 6), 12, 10**6, spares=1, checkpoint_every=5, gather_s=5.0)


class Fleet:
    """Workers that do what they are told, though not at once: what they would say next is `words`."""

    def __init__(self, rng: Random) -> None:
        self.rng = rng
        self.alive: dict[WorkerId, WorkerInfo] = {}
        self.held: dict[WorkerId, tuple[m.Held, ...]] = {}
        self.words: list[m.Event] = []
        self.said: list[m.Event] = []
        self.flags = Flags.NONE
        self.started = 0

    def carry_out(self, outputs: Sequence[m.Output]) -> None:
        for output in outputs:
            for command in output.commands:
                self.do(command)

    def do(self, command: m.Command) -> None:
        match command:
            case m.Start(count):
                self.words += [self.new() for _ in range(count)]
            case m.Kill(worker, reason):
                self.alive.pop(worker, None)
                self.words.append(m.WorkerLost(worker, reason))
            case m.Abort(worker, _, generation, ask):
                answer = m.Answer(m.Position(generation, 1), self.held.get(worker, ()))
                self.words.append(m.Answered(worker, generation, ask, answer))
            case m.Settle(worker, _, ask, decision):
                self.words.append(m.Settled(worker, decision.generation, ask, self.held.get(worker, ())))
            case m.Form(worker, _, world):
                self.held[worker] = (m.Held(world.layout.shard(worker), world.base),)
                self.words.append(m.Joined(worker, world.generation, self.rng.random(), self.rng.random()))
            case m.Probe(worker, _, probe):
                held = self.held.get(worker)
                version = held[0].version if held else None
                generation = version.generation if version else 0
                position = m.Position(generation, self.rng.randint(0, 2), self.rng.choice([0, 1, 3, 3]))
                self.words.append(m.Located(worker, probe, position))
            case m.Request(flags=flags):
                self.flags |= flags
            case m.CommitCheckpoint(version):
                self.words.append(m.CheckpointCommitted(version, 1))
            case m.LookAt(version, file):
                self.words.append(m.Looked(version, file))
            case _:
                pass

    def new(self) -> m.WorkerReady:
        self.started += 1
        name = f"w{self.started:03d}"
        info = WorkerInfo(WorkerId(name), NodeId(f"n{self.started % 3}"), self.started)
        return m.WorkerReady(info)

    def next(self, controller: Controller) -> list[m.Event]:
        """Some of what there is to be heard, in any order, and what happens besides."""
        rng = self.rng
        rng.shuffle(self.words)
        count = rng.randint(0, len(self.words))
        events, self.words = self.words[:count], self.words[count:]
        events += self.steps(controller)
        if rng.random() < 0.3 and controller.roster.alive:
            events += [m.WorkerLost(w, "died") for w in rng.sample(sorted(controller.roster.alive), 1)]
        if self.said and rng.random() < 0.3:
            events.append(rng.choice(self.said))  # old, or twice
        if rng.random() < 0.1:
            events.append(m.Tick())
        rng.shuffle(events)
        self.said = [*self.said, *events][-30:]
        return events

    def steps(self, controller: Controller) -> Iterator[m.Event]:
        """Steps that the world commits, with the parts of a checkpoint where one says so."""
        mode = controller.mode
        if not isinstance(mode, Running) or any(w not in controller.roster.alive for w in mode.world.layout.places):
            return
        world, before = mode.world, controller._state.visible
        reports: list[m.Report] = []
        for step in range(before + 1, before + 1 + self.rng.randint(0, 2)):
            values = [0.0] * SLOTS
            values[Slot.TOKENS] = 1.0
            values[Slot.PAUSE] = float(Flags.PAUSE in self.flags)
            values[Slot.CHECKPOINT] = float(step % 5 == 0)
            reports.append(m.Report(Vote(world.generation, step, tuple(values)), 0.0))
            version = Version(step, world.generation)
            self.held.update((w, (m.Held(world.layout.shard(w), version),)) for w in world.layout.members)
            if step % 5 == 0:
                self.words += [m.PartWritten(w, version, f"{w}.part", 0.1) for w in world.layout.members]
            if values[Slot.PAUSE]:
                self.flags = Flags.NONE
                break
        if reports:
            yield m.Reported(world.leader, tuple(reports))


def apart(controller: Controller, now: float, events: Sequence[m.Event]) -> tuple[tuple[m.Output, ...], bool]:
    """One after the other; and whether any but the last led to a world, or to the wait for one."""
    outputs: list[m.Output] = []
    early = False
    for event in events:
        outputs.append(controller.step(now, event))
        if len(outputs) < len(events):
            opened = any(isinstance(entry, m.WorldOpened) for entry in outputs[-1].journal)
            early |= opened or isinstance(controller.mode, Gathering)
    return tuple(outputs), early


def told(outputs: Sequence[m.Output]) -> list[object]:
    """What is made durable and done, in order, but for what is done once for all."""
    found: list[object] = []
    for output in outputs:
        found += output.journal
        for command in output.commands:
            if isinstance(command, m.Request):
                command = replace(command, flags=command.flags & ~Flags.PAUSE)
                found += [command] if command.flags else []
            elif not isinstance(command, m.SetTimer | m.Start):
                found.append(command)
    return found


def started(outputs: Sequence[m.Output]) -> int:
    return sum(c.count for output in outputs for c in output.commands if isinstance(c, m.Start))


def timer(outputs: Sequence[m.Output]) -> float | None:
    """The last that was set."""
    return next((c.at for output in reversed(outputs) for c in output.commands if isinstance(c, m.SetTimer)), None)


def copied(controller: Controller) -> Controller:
    after = copy(controller)
    after._state = clone(controller._state)
    return after


def without_pause(controller: Controller) -> object:
    state = clone(controller._state)
    state.pending &= ~Flags.PAUSE
    return freeze(state)


@pytest.mark.parametrize("seed", range(24))
def test_it_is_as_one_after_the_other(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a world formed after the last of them; as it is anyway, where none of the others leads to one, or to the
    wait for one."""
    rng = Random(seed)
    controller, fleet = Controller(POLICY), Fleet(rng)
    now, same = 0.0, 0
    fleet.carry_out(controller.several(now, [m.Started()]))
    form = forming.try_form
    for _ in range(60):
        now += rng.choice([0.0, 0.1, 3.0])
        events = fleet.next(controller)
        if not events:
            continue
        as_it_is, waiting = copied(controller), copied(controller)
        one_by_one, early = apart(as_it_is, now, events)
        monkeypatch.setattr(forming, "try_form", lambda s, now: None)
        patiently, _ = apart(waiting, now, events[:-1])
        monkeypatch.setattr(forming, "try_form", form)
        patiently += (waiting.step(now, events[-1]),)
        outputs = controller.several(now, events)
        assert told(outputs) == told(patiently)
        assert (started(outputs), timer(outputs)) == (started(patiently), timer(patiently))
        assert without_pause(controller) == without_pause(waiting)
        if not early:
            assert told(outputs) == told(one_by_one)
            same += 1
        fleet.carry_out(outputs)
    assert controller._state.generation > 1 and same > 10


def running(policy: Policy) -> tuple[Controller, Fleet]:
    """A run whose first world trains."""
    controller, fleet = Controller(policy), Fleet(Random(0))
    fleet.carry_out([controller.step(0.0, m.Started())])
    while not isinstance(controller.mode, Running):
        events, fleet.words = fleet.words, []
        fleet.carry_out(controller.several(1.0, events))
    return controller, fleet


def report(controller: Controller, step: int) -> m.Reported:
    assert isinstance(controller.mode, Running)
    world = controller.mode.world
    return m.Reported(world.leader, (m.Report(Vote(world.generation, step, (0.0,) * SLOTS), 1.0),))


def test_a_step_is_durable_before_the_decision_that_rests_on_it() -> None:
    controller, _ = running(replace(POLICY, checkpoint_every=None))
    lost = [m.WorkerLost(worker, "died") for worker in sorted(controller.roster.alive)]
    before, after, *_ = controller.several(2.0, [report(controller, 1), *lost])
    assert [c.vote.step for c in before.commands if isinstance(c, m.Metrics)] == [1]
    assert not before.journal
    assert isinstance(after.journal[0], m.StepSettled)


def test_the_end_waits_until_the_last_step_is_durable() -> None:
    controller, _ = running(replace(POLICY, last_step=1, checkpoint_every=None))
    assert isinstance(controller.mode, Running)
    reported = report(controller, 1)
    finished = m.Finished(reported.worker_id, controller.mode.world.generation, reported.reports)
    outputs = controller.several(2.0, [reported, finished])
    assert not any(isinstance(c, m.End) for output in outputs for c in output.commands)
    assert timer(outputs) == 2.0
    assert any(isinstance(c, m.End) for c in controller.step(2.0, m.Tick()).commands)
    assert controller.several(3.0, [m.Tick(), m.Tick()]) == (m.Output(),)


def test_nothing_heard_is_nothing_said() -> None:
    controller, _ = running(POLICY)
    assert controller.several(2.0, []) == (m.Output(),)
