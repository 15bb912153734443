"""What docs/faults.md says of steps that were run again: nothing is hidden among the cells that lose nothing."""

import json
import sys
from pathlib import Path
from xml.sax.saxutils import quoteattr

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import faults_table

CELL = {"kind": "kill", "phase": "written", "problem": "", "heal_s": 0.1}
KEPT = {**CELL, "table": "stages", "phase": "commit", "target": "rank 0", "redone": 0}
BACK = {**CELL, "table": "saves", "target": "all", "redone": 4}
HELD = {**CELL, "table": "saves", "target": "rank 0", "redone": 0}
MIRROR = {**CELL, "table": "mirrors, one copy", "target": "all", "redone": 3}


@pytest.mark.parametrize(
    ("cells", "says"),
    [
        (
            [KEPT, BACK, HELD, MIRROR],
            "4 of 4 cells held. Committed steps that were run again: 0 in 1 cells in which somebody alive has every "
            "slice, or the run ends; 7 in 2 of the 3 of checkpoints, loads and mirrors, where nobody alive had all of "
            "the newest state.",
        ),
        ([{**KEPT, "redone": 2}], "run again: 2 in 1 cells"),
        ([HELD], "run again: 0 in 0 of the 1 of checkpoints"),
    ],
)
def test_steps_that_were_run_again_are_told_apart(cells: list[dict[str, object]], says: str, tmp_path: Path) -> None:
    properties = "".join(f'<property name="fault" value={quoteattr(json.dumps(cell))}/>' for cell in cells)
    file = tmp_path / "soak.xml"
    file.write_text(f"<testsuites><properties>{properties}</properties></testsuites>")
    faults, leak = faults_table.read([file])
    assert says in faults_table.report(faults, leak, when=0.0).splitlines()[0]
