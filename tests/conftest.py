"""How hypothesis draws, and how pytest-xdist shares the tests out: one by one, but for some (see run.py)."""

import re
from typing import Any

import pytest
from hypothesis import settings

# The machines that run this are shared: how long an example takes says nothing. The same examples every time: whoever
# looks for a fault of their own must not meet a new one of ours. `--hypothesis-profile=explore` looks for those.
settings.register_profile("evenkeel", deadline=None, print_blob=True, derandomize=True)
settings.register_profile("explore", deadline=None, print_blob=True, max_examples=2000)
settings.load_profile("evenkeel")

TOGETHER = (
    r"sim/test_swarm\.py",
    r"store/test_checkpoint_crash\.py",
    r"store/.*\[.*\bmoto\b",
    r"store/(test_s3_faults\.py|.*\[.*\brgw\b)",
    *(rf"engine/test_{name}\.py" for name in ("heal", "load", "matrix", "moments")),
    r"runtime/test_(resume|changed_data)\.py",
    *(rf"runtime/test_{name}\.py" for name in ("object_store", "no_room", "saves_on_ray")),
)
"""Tests whose names match one of these are run by one process: they share what is costly to make, such as a server."""
WHOLE_RUNS = {"alone", "site"}
"""Fixtures of tests that take half a minute each."""


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Whole runs come first where several processes share the tests, so that none of them is the last one at work."""
    if hasattr(config, "workerinput"):
        items.sort(key=lambda item: WHOLE_RUNS.isdisjoint(getattr(item, "fixturenames", ())))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    # Not `--dist=loadgroup`: pytest-xdist 3.8 adds the names of groups to node ids, which pytest 9.2 no longer allows.
    from xdist.scheduler import LoadScopeScheduling

    class Scheduler(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return next((group for group in TOGETHER if re.search(group, nodeid)), nodeid)

    return Scheduler(config, log)
