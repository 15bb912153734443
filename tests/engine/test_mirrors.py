"""Mirrors: what only one worker keeps is in another's memory too (redundancy.mirror_every)."""

import gc
import socket
import threading
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from tiny import WHOLE, Tiny, mirrors_here

from evenkeel.control.policy import Policy
from evenkeel.engine.faults import FaultPlan, once_in
from evenkeel.engine.local import LocalRun, Outcome
from evenkeel.engine.mirror import Snapshot
from evenkeel.engine.model import model_shape
from evenkeel.engine.wire import KEEPALIVE_S
from evenkeel.plan.layout import Wish

STEPS, EVERY = 12, 2
STUCK, CUT, COUNT = 10, 11, 12
"""Faults with such an index are none, but see Odd."""
NEVER = 10**9


@dataclass(frozen=True)
class Odd(Tiny):
    """Whoever comes to STUCK for the first time stays there; at CUT its connection for mirrors breaks, and no other.

    At COUNT it is noted how many snapshots there are in the process.
    """

    def fault_once(self, index: int) -> bool:
        if index == COUNT:
            with (self.folder / "snapshots").open("a") as file:
                print(sum(type(thing) is Snapshot for thing in gc.get_objects()), file=file)
            return False
        if index not in (STUCK, CUT):
            return super().fault_once(index)
        if once_in(self.folder)(index):
            if index == STUCK:
                threading.Event().wait()
            links = mirrors_here()._links
            assert links is not None and links.keeper is not None
            assert links.keeper.sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
            assert links.keeper.sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE) == KEEPALIVE_S
            links.keeper.sock.shutdown(socket.SHUT_RDWR)
        return False


def trained(
    folder: Path, faults: tuple[FaultPlan, ...] = (), *, every: int = EVERY, wish: Wish | None = None,
    copies: int | None = None, spares: int = 1, precision: str = "fp32", tied: bool = True, no_others: bool = False,
) -> tuple[Outcome, Tiny]:  # fmt: skip
    """One pipeline of two stages, unless `wish` says otherwise. `no_others`: nobody comes in place of the dead."""
    folder.mkdir()
    job = Odd(folder, precision=precision, steps=STEPS, tied=tied, faults=faults)
    wish = wish or Wish(data=1, pipeline=2, tensor=1, min_workers=2, max_workers=2)
    policy = Policy(model_shape(job.model()), wish, 4, STEPS, spares, copies=copies, mirror_every=every)
    not_before = {wish.max_workers + spares: NEVER} if no_others else None
    return LocalRun(job, policy, not_before=not_before).run(), job


def kill(phase: str, rank: int, step: int, index: int = 0) -> FaultPlan:
    return FaultPlan(index, step, phase, f"rank:{rank}", "kill")


def whole_before(steps: Iterable[int] = range(1, STEPS + 1), ranks: int = 2) -> tuple[FaultPlan, ...]:
    """Nobody goes into these steps before the last mirror is whole: so none is late, however slow this machine is."""
    plans = ((step, f"rank:{rank}") for step in steps for rank in range(ranks))
    return tuple(FaultPlan(WHOLE, step, "forward", target, "exception") for step, target in plans)


def last_of_each_step(outcome: Outcome) -> list[float | None]:
    """Losses by step; of a step that was committed again the last one counts."""
    losses = {line.vote.step: line.vote.loss for line in outcome.metrics}
    assert sorted(losses) == list(range(1, STEPS + 1))
    return [losses[step] for step in sorted(losses)]


def bases(outcome: Outcome) -> list[int]:
    return [line.fields["base"] for line in outcome.named("restored")]


def check_same(found: tuple[Outcome, Tiny], expected: tuple[Outcome, Tiny]) -> None:
    outcome, job = found
    assert (outcome.status, outcome.error) == ("finished", "")
    assert last_of_each_step(outcome) == expected[0].losses
    assert all(torch.equal(job.final()[name], value) for name, value in expected[1].final().items())


@pytest.fixture(scope="module", params=["fp32", "bf16"])
def undisturbed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Outcome, Tiny]:
    return trained(tmp_path_factory.mktemp("mirrors") / "undisturbed", precision=request.param)


@pytest.mark.parametrize(("phase", "rank"), [("backward", 0), ("after_vote", 1), ("commit", 0), ("before_vote", 1)])
def test_a_death_goes_back_no_further_than_to_the_mirrors(
    phase: str, rank: int, undisturbed: tuple[Outcome, Tiny], tmp_path: Path
) -> None:
    """Bit by bit the same run, although nobody else had what the dead worker had, and there is no store."""
    faults = (*whole_before(), kill(phase, rank, 8))
    found = trained(tmp_path / "run", faults, precision=undisturbed[1].precision)
    check_same(found, undisturbed)
    assert bases(found[0]) == [8 - EVERY]
    assert len(found[0].named("worker_lost")) == 1


def test_a_mirror_that_takes_long_costs_the_steps_that_it_took(
    undisturbed: tuple[Outcome, Tiny], tmp_path: Path
) -> None:
    """That of step 6 never arrives: until the death in step 11 the one before it is the newest that is whole."""
    stuck = FaultPlan(STUCK, 6, "exchange", "rank:0", "exception")
    faults = (*whole_before(range(1, 7)), stuck, kill("before_vote", 0, 11))
    found = trained(tmp_path / "run", faults, precision=undisturbed[1].precision)
    check_same(found, undisturbed)
    assert bases(found[0]) == [4]


def test_two_deaths_one_after_the_other(undisturbed: tuple[Outcome, Tiny], tmp_path: Path) -> None:
    """The second hits the one who kept all at the first: both places had been filled again."""
    faults = (*whole_before(), kill("forward", 1, 6), kill("reduce", 0, 10, index=1))
    found = trained(tmp_path / "run", faults, spares=2, precision=undisturbed[1].precision)
    check_same(found, undisturbed)
    assert bases(found[0]) == [6 - EVERY, 10 - EVERY]


@pytest.mark.parametrize(
    ("index", "phase", "cause"),
    [(1, "exchange", "exception"), (1, "mirrored", "exception"), (CUT, "exchange", "broken collective")],
)
def test_a_mirror_that_fails_is_not_the_last_one(
    index: int, phase: str, cause: str, undisturbed: tuple[Outcome, Tiny], tmp_path: Path
) -> None:
    """Nothing else fails, so that the step would be committed. A later death goes back to a later mirror."""
    noticed = FaultPlan(WHOLE, 5, "forward", "rank:1", "exception")
    fails = FaultPlan(index, 4, phase, "rank:1", "exception")
    faults = (noticed, fails, *whole_before(range(6, STEPS + 1)), kill("backward", 0, 10))
    found = trained(tmp_path / "run", faults, precision=undisturbed[1].precision)
    check_same(found, undisturbed)
    outcome = found[0]
    assert [(w.cause, w.base.step) for w in outcome.worlds] == [("start", 0), (cause, 4), ("worker lost", 8)]
    assert outcome.worlds[1].layout == outcome.worlds[0].layout
    assert [line.fields["lost"] for line in outcome.named("incident")] == [[], [outcome.worlds[0].members[0].worker_id]]
    told = [line.fields["text"] for line in outcome.named("exception")]
    assert len(told) == (cause == "exception")
    assert all("mirror of step 4: InjectedError" in text for text in told)


def test_mirrors_that_always_fail_end_the_run(tmp_path: Path) -> None:
    noticed = FaultPlan(WHOLE, 5, "forward", "rank:1", "exception")
    fails = tuple(FaultPlan(index, 4, "exchange", "rank:1", "exception") for index in range(2))
    outcome, _ = trained(tmp_path / "run", (noticed, *fails))
    assert outcome.status == "failed"
    assert outcome.error.startswith("failed again after a retry: ")
    assert "mirror of step 4: InjectedError" in outcome.error


def test_one_copy_and_a_mirror(tmp_path: Path) -> None:
    """ZeRO-1 over three pipelines: every worker has a third of the state, and another one's in its host memory."""
    wish = Wish(data=3, pipeline=1, tensor=1, min_workers=3, max_workers=3)
    expected = trained(tmp_path / "undisturbed", wish=wish, copies=1)
    faults = (*whole_before(ranks=3), kill("backward", 2, 6))
    found = trained(tmp_path / "run", faults, wish=wish, copies=1)
    check_same(found, expected)
    assert bases(found[0]) == [6 - EVERY]


def test_tensor_parallel(tmp_path: Path) -> None:
    """Parameters that all tensor-parallel ranks have belong to the snapshots of each."""
    wish = Wish(data=1, pipeline=1, tensor=2, min_workers=2, max_workers=2)
    expected = trained(tmp_path / "undisturbed", wish=wish, tied=False)
    found = trained(tmp_path / "run", (*whole_before(), kill("commit", 1, 6)), wish=wish, tied=False)
    check_same(found, expected)
    assert bases(found[0]) == [6 - EVERY]


@pytest.mark.parametrize("failed", [False, True])
def test_a_world_without_mirrors_frees_those_that_there_were(failed: bool, tmp_path: Path) -> None:
    """One of two dies, whose half of the state the other has in mirrors: until its first vote alone (rule 13)."""
    wish = Wish(data=2, pipeline=1, tensor=1, min_workers=1, max_workers=2)
    counted = tuple(FaultPlan(COUNT, step, "before_vote", "rank:0", "exception") for step in range(1, STEPS + 1))
    whole = whole_before()
    if failed:  # whoever is to receive what is never sent cannot wait for it
        fails = FaultPlan(1, 4, "exchange", "rank:0", "exception")
        noticed = FaultPlan(WHOLE, 5, "forward", "rank:0", "exception")
        whole = (*whole_before((*range(1, 5), *range(6, STEPS + 1))), fails, noticed)
    faults = (*counted, *whole, kill("backward", 1, 6))
    outcome, job = trained(tmp_path / "run", faults, wish=wish, copies=1, spares=0, no_others=True)
    assert (outcome.status, outcome.error) == ("finished", "")
    assert [world.mirror_every for world in outcome.worlds] == [EVERY] * (1 + failed) + [None]
    assert bases(outcome) == [4]
    one = 2  # of a version: its own snapshot and the other's
    then = one if failed else 2 * one  # each has its own of step 4: the next world needs none of step 2
    counts = [int(line) for line in (job.folder / "snapshots").read_text().split()]
    assert counts == [0, 0, one, one, then, then, *[0] * (STEPS - 5)], "by step; step 5 is run again, alone"


def test_whoever_has_a_live_copy_needs_none(tmp_path: Path) -> None:
    wish = Wish(data=2, pipeline=1, tensor=1, min_workers=1, max_workers=2)
    outcome, _ = trained(tmp_path / "run", (kill("backward", 1, 5),), wish=wish)
    assert (outcome.status, bases(outcome)) == ("finished", [])
    assert [world.mirror_every for world in outcome.worlds] == [None] * len(outcome.worlds)


def test_without_mirrors_it_is_lost(tmp_path: Path) -> None:
    outcome, _ = trained(tmp_path / "run", (kill("backward", 1, 5),), every=0)
    assert outcome.status == "failed"
    assert "step 4 is lost: nobody alive holds " in outcome.error
