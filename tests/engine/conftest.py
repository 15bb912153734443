"""Results of the fault matrix, noted for docs/faults.md."""

import json
from collections.abc import Callable
from multiprocessing import forkserver, get_context

import pytest
from matrix import Result

PRELOAD = ("torch", "torch.distributed", "evenkeel.engine.worker", "evenkeel.runtime.job", "evenkeel.runtime.record")


@pytest.fixture(scope="session", autouse=True)
def preloaded() -> None:
    """Processes fork from a server that has imported all that they need; it starts with the first list that it gets."""
    get_context("forkserver").set_forkserver_preload(list(PRELOAD))
    forkserver.ensure_running()


@pytest.fixture
def check(request: pytest.FixtureRequest) -> Callable[[str, list[Result]], None]:
    """Notes the results for the table (they go to the JUnit file), then asserts that every cell holds."""

    def check(table: str, results: list[Result]) -> None:
        for r in results:
            line = {
                "table": table, "kind": r.kind, "phase": r.phase, "target": r.target, "problem": r.problem,
                "heal_s": round(r.heal_s, 4), "redone": r.redone,
            }  # fmt: skip
            request.node.user_properties.append(("fault", json.dumps(line)))
        assert [r.text for r in results if r.problem] == []

    return check
