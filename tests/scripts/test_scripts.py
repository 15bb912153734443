"""Scenarios as text; after a change of the controller that is meant, `EVENKEEL_REWRITE=1 pytest tests/scripts`."""

import os
from pathlib import Path

import pytest
from runner import Script, is_played, parse, render

SCRIPTS = sorted(Path(__file__).parent.glob("*.txt"))


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_script(path: Path) -> None:
    script, text = Script(), path.read_text()
    blocks = parse(text)
    for block in blocks:
        said = script.play(block)
        block.expected = said if is_played(block) else []
    if os.environ.get("EVENKEEL_REWRITE"):
        path.write_text(render(blocks))
        return
    assert render(blocks) == text, f"{path.name} differs; EVENKEEL_REWRITE=1 rewrites it, if the change is meant"


def test_there_are_scenarios() -> None:
    assert len(SCRIPTS) >= 20
