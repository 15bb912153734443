"""The controller's work for an incident grows with the world, and not faster: counted in calls, not in seconds."""

import gc
import sys
from pathlib import Path
from types import FrameType

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "jobs"))

from bench.controlling import Drill
from evenkeel.control.modes import Running


def calls(nodes: int, alone: bool) -> int:
    """Of functions, built-in ones too, and of generators for one more item, while a node is lost and replaced."""
    drill = Drill(nodes, alone=alone)
    drill.begin()
    drill.lose_a_node()
    count = 0

    def counted(frame: FrameType, event: str, _: object) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(counted)
    try:
        drill.lose_a_node()
    finally:
        sys.setprofile(None)
    return count


@pytest.mark.parametrize("alone", [False, True], ids=["at once", "one by one"])
def test_four_times_the_workers_are_four_times_the_work(alone: bool) -> None:
    assert calls(64, alone) < 4.2 * calls(16, alone)


def test_the_world_is_the_same_however_it_is_heard() -> None:
    worlds = []
    for alone in (False, True):
        drill = Drill(16, alone=alone)
        drill.begin()
        drill.lose_a_node()
        drill.ask_everybody()
        assert isinstance(drill.controller.mode, Running)
        worlds.append(drill.controller.mode.world)
    assert worlds[0] == worlds[1]
    assert worlds[0].generation == 2
    assert worlds[0].size == 16 * 8


def test_what_an_incident_leaves_behind_needs_no_garbage_collector() -> None:
    """So that a simulation of months may go without one, which takes a third of its time."""
    drill = Drill(16)
    drill.begin()
    drill.lose_a_node()
    gc.collect()
    gc.disable()
    try:
        for _ in range(3):
            drill.lose_a_node()
        assert gc.collect() == 0
    finally:
        gc.enable()
