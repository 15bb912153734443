"""A run that goes on finds its newest checkpoint damaged: that is named, and the one before is taken."""

from pathlib import Path

import pytest
from lives import Life, finished, prepared_in

from evenkeel.control import messages as m
from evenkeel.core.ids import Version
from evenkeel.store.checkpoints import Checkpoints

STEPS, FIRST = 9, 5
"""Of the whole run, and of its first life: with a checkpoint every second step and one of the last, 4 and 5 stay."""


def flip(part: Path) -> None:
    data = bytearray(part.read_bytes())
    data[-3] ^= 1
    part.write_bytes(data)


def break_disk(part: Path) -> None:
    """Linux answers EIO to whoever reads the first bytes of this file, where nothing is mapped."""
    part.unlink(missing_ok=True)
    part.symlink_to("/proc/self/mem")


@pytest.mark.parametrize("how", ["a flipped bit", "an error of the disk"])
def test_it_is_named_and_the_one_before_is_taken(how: str, tmp_path: Path) -> None:
    """Of two stages one cannot be read; whoever has read the other goes back, too."""
    truth = finished(Life(prepared_in(tmp_path, "truth", STEPS))).losses
    prepared = prepared_in(tmp_path, "run", STEPS)
    before = finished(Life(prepared, last_step=FIRST))
    assert before.losses == truth[:FIRST]
    newest, earlier = Checkpoints(prepared.directory.files).newest_first()[0]
    assert (newest.manifest.version, earlier.manifest.version) == (Version(5, 1), Version(4, 1))
    part = Path(newest.url) / newest.manifest.files[0].name
    if how == "a flipped bit":
        flip(part)
        life = Life(prepared, before)
    else:
        life = Life(prepared, before, formed=lambda: break_disk(part))
    outcome = finished(life)
    [damaged] = outcome.named("checkpoint_damaged")
    assert damaged.fields["error"].startswith(f"{part}: ")
    [unreadable] = outcome.named("checkpoint_unreadable")
    says = "bytes 0 to " if how == "a flipped bit" else "Input/output error"
    assert says in unreadable.fields["error"]
    seen = "bytes 0 to " if how == "a flipped bit" else "has 0 bytes, "  # the controller begins with the sizes
    assert seen in damaged.fields["error"]
    [back] = [entry for entry in outcome.journal if isinstance(entry, m.Restored)]
    assert back.base == Version(4, 1) and "step 5 is lost" in back.reason
    assert [(world.base, world.saved) for world in outcome.worlds] == [(Version(5, 1), True), (Version(4, 1), True)]
    assert outcome.losses == truth[4:]
