"""A planned fault comes at its moment: the thread that reaches it does nothing more."""

import signal
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from processes import children

from evenkeel.core.ids import NodeId, Version, WorkerId
from evenkeel.core.layout import Layout, Pipeline, Stage, WorkerInfo
from evenkeel.core.world import World
from evenkeel.engine.faults import FaultPlan, Faults, once_in
from evenkeel.engine.local import static_world

ME = WorkerId("w0000")
WORLD = static_world(
    [WorkerInfo(ME, NodeId("here"), 0)], Layout((Pipeline((Stage(0, 1, (ME,)),), 0, 1),)), last_step=9
)  # fmt: skip


def train(line: Any, rank: int, folder: Path, kind: str) -> None:
    """A thread runs into the fault and goes on, if it can, while the main thread waits for a command."""
    own = folder / str(rank)
    own.mkdir()
    faults = Faults(ME, [FaultPlan(0, 3, "before_vote", "rank:0", kind)], once_in(own))
    faults.joining(WORLD)

    def work() -> None:
        line.receive()
        faults.fire("before_vote", 3)
        (own / "went on").touch()

    threading.Thread(target=work, daemon=True).start()
    line.send("ready")
    threading.Event().wait()


@pytest.mark.parametrize(("kind", "number"), [("segv", signal.SIGSEGV), ("kill", signal.SIGKILL)])
def test_nothing_comes_after_a_signal(kind: str, number: int, tmp_path: Path) -> None:
    with children(train, 4, tmp_path, kind) as started:
        for child in started:
            assert child.receive() == "ready"
            child.send("go")
        for child in started:
            with pytest.raises(AssertionError, match=f"ended with -{number}"):
                child.receive()
        assert list(tmp_path.glob("*/went on")) == []


def test_each_fault_fires_once_and_where_it_is_planned(tmp_path: Path) -> None:
    plans = [FaultPlan(0, 3, "reduce", "rank:0", "exception"), FaultPlan(1, 4, "recovery", "stage:0", "exception")]
    faults = Faults(ME, plans, once_in(tmp_path))
    faults.joining(WORLD)
    faults.fire("reduce", 2)
    faults.fire("commit", 3)
    with pytest.raises(RuntimeError, match="planned fault 0: reduce of step 3"):
        faults.fire("reduce", 3)
    faults.fire("reduce", 3)
    faults.recovering(recovery_from(2))
    with pytest.raises(RuntimeError, match="planned fault 1"):
        faults.recovering(recovery_from(3))
    faults.recovering(recovery_from(3))


def recovery_from(step: int) -> World:
    return World(2, WORLD.layout, Version(step, 1), WORLD.members, (), WORLD.nodes, 9, "worker lost", "")


def test_within_a_checkpoint_the_first_one_counts_that_is_not_before_the_step(tmp_path: Path) -> None:
    faults = Faults(ME, [FaultPlan(0, 3, "write", "rank:0", "exception")], once_in(tmp_path))
    faults.joining(WORLD)
    faults.fire("write", 2)
    faults.fire("save", 4)
    with pytest.raises(RuntimeError, match="planned fault 0: write of step 3"):
        faults.fire("write", 4)
    faults.fire("write", 8)


def test_a_load_is_of_a_world_that_begins_from_a_checkpoint(tmp_path: Path) -> None:
    faults = Faults(ME, [FaultPlan(0, 3, "load", "rank:0", "exception")], once_in(tmp_path))
    faults.joining(WORLD)
    faults.loaded(recovery_from(2))
    faults.loaded(replace(recovery_from(1), saved=True))
    with pytest.raises(RuntimeError, match="planned fault 0"):
        faults.loaded(replace(recovery_from(2), saved=True))
