"""SIGKILL before each thing that a writer does to the file system: what was complete stays, what was not is invisible.

Run as a script, this file is that writer: for each moment it forks a process, which dies there.
"""

import os
import signal
import subprocess
import sys
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from checkpoint_state import checkpoints, load, make_state, same, save, write_parts

from evenkeel.core.ids import Version
from evenkeel.store.files import LocalFiles

STATES = {10: make_state(10), 20: make_state(20), 30: make_state(30)}
EVENTS = ("open", "os.mkdir", "os.rename", "os.link", "os.remove", "os.rmdir", "os.scandir", "os.listdir")
"""What Python tells an audit hook of just before it is done; os.fsync, of which it does not, is counted too."""


def write(root: Path) -> None:
    """What the workers and the controller do, one after the other."""
    files = LocalFiles(root)
    save(files, STATES[20], 20)
    checkpoints(files).prune(keep=1)


def die_before(moment: int) -> None:
    """From now on this process kills itself before the `moment`-th thing that it does to the file system."""
    moments = count(1)

    def tick() -> None:
        if next(moments) == moment:
            os.kill(os.getpid(), signal.SIGKILL)

    def audit(event: str, args: Any) -> None:
        if event in EVENTS:
            tick()

    def fsync(fd: int, really: Any = os.fsync) -> None:
        tick()
        really(fd)

    os.fsync = fsync
    sys.addaudithook(audit)


def main(root: Path) -> None:
    for moment in count(1):
        place = root / f"{moment:03d}"
        files = LocalFiles(place)
        write_parts(files, Version(5, 1), STATES[10])  # half-written, to be cleaned up
        save(files, STATES[10], 10)
        child = os.fork()
        if child == 0:
            die_before(moment)
            write(place)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        if os.waitstatus_to_exitcode(status) != -signal.SIGKILL:
            assert status == 0
            return


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A run directory for each moment, as the killed process left it; in the last one nobody was killed."""
    root = tmp_path_factory.mktemp("crash")
    path = os.pathsep.join(str(folder) for folder in sys.path if folder)
    subprocess.run([sys.executable, __file__, str(root)], check=True, env={**os.environ, "PYTHONPATH": path})
    return sorted(root.iterdir())


def test_the_moments_are_all_there_is(places: list[Path]) -> None:
    """Before, within and after each part, the manifest, and the removal of what is older."""
    left = {tuple(sorted(p.name for p in (place / "checkpoints").iterdir())) for place in places}
    both = ("step-00000005", "step-00000010", "step-00000020")
    assert {both[:2], both, both[1:], both[2:]} <= left
    unfinished = [path.name for place in places for path in place.rglob(".*.tmp-*")]
    for name in (".g1-w0000", ".g1-w0001", ".manifest"):
        assert any(path.startswith(name) for path in unfinished), "killed while it was being written"
    assert len(places) > 30


def test_the_last_complete_one_can_be_loaded_whenever_its_writer_was_killed(places: list[Path]) -> None:
    newest = []
    for place in places:
        good, damaged = checkpoints(LocalFiles(place)).newest_first()
        assert damaged == {}, place.name
        steps = [found.manifest.version.step for found in good]
        assert steps in ([10], [20, 10], [20]), place.name
        for found in good:
            assert same(load(found), STATES[found.manifest.version.step]), place.name
        newest.append(steps[0])
    assert newest == sorted(newest) and set(newest) == {10, 20}


def test_the_next_one_is_written_and_what_was_left_is_cleaned_up(places: list[Path]) -> None:
    for place in places:
        files = LocalFiles(place)
        redone = save(files, STATES[20], 20, generation=2)
        assert same(load(redone), STATES[20])
        save(files, STATES[30], 30, generation=2)
        checkpoints(files).prune(keep=1)
        left = {str(path.relative_to(place)) for path in place.rglob("*") if path.is_file()}
        names = ("g2-w0000.safetensors", "g2-w0001.safetensors", "manifest.json")
        assert left == {f"checkpoints/step-00000030/{name}" for name in names}, place.name


if __name__ == "__main__":
    main(Path(sys.argv[1]))
