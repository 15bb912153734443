"""Scenarios as text; after a change of the controller that is meant, `EVENKEEL_REWRITE=1 pytest tests/scripts`."""

import os
from pathlib import Path

import pytest
from runner import replay

SCRIPTS = sorted(Path(__file__).parent.glob("*.txt"))


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_script(path: Path) -> None:
    text = path.read_text()
    said = replay(text)
    if os.environ.get("EVENKEEL_REWRITE"):
        path.write_text(said)
        return
    assert said == text, f"{path.name} differs; EVENKEEL_REWRITE=1 rewrites it, if the change is meant"


def test_there_are_scenarios() -> None:
    assert len(SCRIPTS) >= 20
