"""What the journal alone says of checkpoints is what the run itself holds of them, at any moment of every scenario."""

from pathlib import Path

import pytest
from runner import Script, parse, show_version
from test_scripts import SCRIPTS

from evenkeel.control.divergence import distrusted

DISTRUSTED = {
    "80_odd_copy_of_three": "1@1",
    "81_two_copies_differ": "4@1 3@2",
    "82_copies_differ_before_any_checkpoint": "1@1 2@2",
    "83_restart_after_copies_differed": "2@1",
    "84_restart_when_no_copy_counts": "2@1",
    "85_odd_and_undecided": "2@1",
    "86_copies_differ_without_checkpoints": "1@1",
    "87_untrusted_when_its_writer_died": "4@1 5@2",
    "88_asked_for_what_differed": "2@1",
    "91_kept_copies_differ_after_reading": "4@1 4@3 5@4",
}


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_the_journal_says_what_the_run_distrusts(path: Path) -> None:
    script = Script()
    for block in parse(path.read_text()):
        script.play(block)
        if script.controller is not None:
            assert distrusted(script.journal).keys() == script.controller._state.distrusted
    found = sorted(distrusted(script.journal), key=lambda version: version.generation)
    if path.stem in DISTRUSTED:
        assert " ".join(map(show_version, found)) == DISTRUSTED[path.stem]


def test_these_scenarios_are_there() -> None:
    assert DISTRUSTED.keys() <= {path.stem for path in SCRIPTS}
