"""How pytest-xdist shares the tests out where several processes run them (see run.py): one by one, but for some."""

import re
from typing import Any

import pytest

TOGETHER = (
    r"sim/test_swarm\.py",
    r"store/test_checkpoint_crash\.py",
    r"store/(test_s3_faults\.py|.*\[.*\b(moto|rgw)\b)",
    *(rf"engine/test_{name}\.py" for name in ("heal", "load", "matrix", "moments")),
    r"runtime/test_(resume|changed_data)\.py",
)
"""Tests whose names match one of these are run by one process: they share what is costly to make, such as a server."""


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    # Not `--dist=loadgroup`: pytest-xdist 3.8 adds the names of groups to node ids, which pytest 9.1 no longer allows.
    from xdist.scheduler import LoadScopeScheduling

    class Scheduler(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return next((group for group in TOGETHER if re.search(group, nodeid)), nodeid)

    return Scheduler(config, log)
