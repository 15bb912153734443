"""One worker's answers to the controller, in one process: promises, refusals, and who is freed from what."""

import math
import queue
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
from tiny import GATE, Tiny, layout_of
from torch import nn

from evenkeel.control import messages as m
from evenkeel.control.member import RING
from evenkeel.core.ids import NodeId, WorkerId
from evenkeel.core.world import World
from evenkeel.engine.faults import FaultPlan
from evenkeel.engine.job import Job
from evenkeel.engine.local import static_world
from evenkeel.engine.model import Model
from evenkeel.engine.worker import Worker


class Host:
    """A worker, and what it sends."""

    def __init__(self, name: str, job: Tiny) -> None:
        self.sent: queue.SimpleQueue[m.Event] = queue.SimpleQueue()
        self.id = WorkerId(name)
        self.worker = Worker(self.id, NodeId("here"), job(self.id), self._send)

    def _send(self, event: m.Event) -> None:
        if not isinstance(event, m.MemoryUsed):  # see test_memory.py
            self.sent.put(event)

    def form(self, world: World, epoch: int = 1) -> None:
        assert self.worker.deliver(m.Form(self.id, epoch, world)) is None

    def abort(self, generation: int, epoch: int = 1) -> m.Answered | None:
        answered = self.worker.deliver(m.Abort(self.id, epoch, generation, 1, 0))
        assert answered is None or isinstance(answered, m.Answered)
        return answered

    def position(self) -> m.Position:
        located = self.worker.deliver(m.Probe(self.id, 1, 1))
        assert isinstance(located, m.Located)
        return located.position


@pytest.fixture
def host(tmp_path: Path):  # type: ignore[no-untyped-def]
    hosts: list[Host] = []

    def make(name: str = "a", steps: int = 10**6, faults: tuple[FaultPlan, ...] = ()) -> Host:
        hosts.append(Host(name, Tiny(tmp_path, steps=steps, faults=faults)))
        return hosts[-1]

    yield make
    for each in hosts:
        each.worker.close()


def world_of(*hosts: Host, steps: int = 10**6) -> World:
    infos = [each.worker.info() for each in hosts]
    shares = [4 // len(hosts)] * len(hosts)
    return static_world(infos, layout_of([each.id for each in hosts], [[0, 4]] * len(hosts), 1, shares), steps)


def test_a_spare_answers_at_once_and_refuses_what_it_has_promised_not_to_do(host) -> None:  # type: ignore[no-untyped-def]
    a = host()
    answered = a.abort(3)
    assert answered is not None
    assert (answered.answer.held, answered.answer.saw, answered.answer.prepared) == ((), None, None)
    a.form(world_of(a))  # generation 1: below the floor that the abort of 3 has set (rule 14)
    assert a.position().phase == m.PHASES.index("parked")
    assert a.sent.empty()
    assert a.abort(2) is None


def test_who_waits_for_a_member_that_never_comes_is_freed_by_an_abort(host) -> None:  # type: ignore[no-untyped-def]
    a, b = host("a"), host("b")
    a.form(world_of(a, b))
    while not a.position().waiting:
        pass
    assert a.position().phase == m.PHASES.index("regroup")
    answered = a.abort(1)
    assert answered is not None
    assert a.sent.empty()  # an abort is no failure
    assert a.abort(1, epoch=0) is None


class Saving(Tiny):
    """Its parts are written at once."""

    def __call__(self, worker_id: WorkerId) -> Job:
        return replace(super().__call__(worker_id), save=lambda *_: "all of it")


def test_a_new_life_of_the_controller_is_told_of_the_last_part(tmp_path: Path) -> None:
    """With its first word, and once: the life that has heard of it may have died before the step was durable."""
    a = Host("a", Saving(tmp_path, steps=1))
    a.form(replace(world_of(a, steps=1), checkpoint_every=1), epoch=3)
    events: list[m.Event] = []
    while not events or not isinstance(events[-1], m.PartWritten):
        events.append(a.sent.get())
    while a.position().phase != m.PHASES.index("parked"):
        pass
    while not a.sent.empty():
        a.sent.get()
    for epoch, told in ((3, 0), (2, 0), (4, 1), (4, 0), (3, 0), (7, 1)):
        a.worker.deliver(m.Probe(a.id, epoch, 1))
        assert [a.sent.get_nowait() for _ in range(a.sent.qsize())] == told * events[-1:], epoch
    a.worker.close()


def test_of_two_aborts_that_wait_for_a_slow_thread_the_last_one_answers(host, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    """The controller asks again; else its questions would take up all the threads that answer, one by one."""
    a = host(faults=(FaultPlan(GATE, 1, "forward", "rank:0", "exception"),))
    a.form(world_of(a))
    assert isinstance(a.sent.get(), m.Joined)
    while a.position().phase != m.PHASES.index("forward"):
        pass
    with ThreadPoolExecutor() as threads:
        first = threads.submit(a.abort, 1)
        while a.worker._aborts < 1:
            pass
        second = threads.submit(a.abort, 1)
        assert first.result() is None
        assert not second.done()
        (tmp_path / "open").touch()
        assert second.result() is not None


def test_two_workers_train_until_they_are_aborted_and_agree_on_what_they_hold(host) -> None:  # type: ignore[no-untyped-def]
    a, b = host("a"), host("b")
    world = world_of(a, b)
    a.form(world)
    b.form(world)
    assert isinstance(b.sent.get(), m.Joined)
    assert isinstance(a.sent.get(), m.Joined)
    reported = [a.sent.get() for _ in range(3)]
    assert [event.reports[-1].vote.step for event in reported if isinstance(event, m.Reported)] == [1, 2, 3]
    answers = [each.abort(1) for each in (a, b)]
    steps = [answer.answer.held[0].version.step for answer in answers]  # type: ignore[union-attr]
    saw = max(answer.answer.saw.step for answer in answers)  # type: ignore[union-attr]
    assert max(steps) - min(steps) <= 1
    for each, answer in zip((a, b), answers, strict=True):
        assert answer is not None
        seen = next(r.vote for x in answers for r in x.answer.unreported if r.vote.step == saw)  # type: ignore[union-attr]
        base = m.Version(saw, 1)
        settled = each.worker.deliver(m.Settle(each.id, 1, 1, m.Decision(1, base, seen, "")))
        assert isinstance(settled, m.Settled)
        assert [held.version for held in settled.held] == [base]
        assert each.worker.deliver(m.Settle(each.id, 0, 1, m.Decision(1, base, seen, ""))) is None


def test_a_leader_pauses_when_nobody_acknowledges_and_goes_on_when_somebody_does(host) -> None:  # type: ignore[no-untyped-def]
    a = host()
    a.form(world_of(a))
    assert isinstance(a.sent.get(), m.Joined)
    steps = [a.sent.get().reports[-1].vote.step for _ in range(RING)]
    assert steps == list(range(1, RING + 1))
    assert a.sent.empty()
    a.worker.acknowledge(RING)
    assert a.sent.get().reports[-1].vote.step == RING + 1
    answered = a.abort(1)
    assert answered is not None
    assert answered.answer.unreported[0].vote.step == RING + 1


def test_the_leader_says_when_the_last_step_and_the_final_model_are_there(host, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    a = host(steps=2)
    a.form(world_of(a, steps=2))
    kinds = [type(a.sent.get()).__name__ for _ in range(4)]
    assert kinds == ["Joined", "Reported", "Reported", "Finished"]
    assert (tmp_path / "final.safetensors").exists()


class NoNumber(Tiny):
    def model(self) -> Model:
        model = super().model()
        *layers, last = model.layers
        return replace(model, layers=(*layers, replace(last, build=partial(_times_nan, last.build))))


def _times_nan(build: Callable[[], nn.Module]) -> nn.Module:
    layer = build()
    layer.register_forward_hook(lambda module, inputs, output: output * math.nan)
    return layer


def test_a_worker_says_what_is_not_finite(tmp_path: Path) -> None:
    a = Host("a", NoNumber(tmp_path, steps=1))
    try:
        a.form(world_of(a, steps=1))
        assert isinstance(a.sent.get(), m.Joined)
        told, reported = a.sent.get(), a.sent.get()
        assert isinstance(told, m.NotFinite) and isinstance(reported, m.Reported)
        assert reported.reports[0].vote.skip
    finally:
        a.worker.close()
    assert (told.worker_id, told.step) == ("a", 1)
    assert told.what.startswith("the loss and the gradients of embed.tokens.weight, ")
    assert told.what.endswith(" that are not finite")


def test_after_too_many_steps_that_are_not_finite_nobody_goes_on(tmp_path: Path) -> None:
    """However late the controller hears of them: the run has failed, so there is no final model."""
    a = Host("a", NoNumber(tmp_path, steps=4))
    try:
        a.form(replace(world_of(a, steps=4), bad_steps=1, max_bad_steps=3))
        events = [a.sent.get() for _ in range(5)]
        assert [type(event).__name__ for event in events] == ["Joined"] + ["NotFinite", "Reported"] * 2
        while a.position().phase != m.PHASES.index("parked"):
            pass
        assert a.sent.empty()
    finally:
        a.worker.close()
    assert not (tmp_path / "final.safetensors").exists()
