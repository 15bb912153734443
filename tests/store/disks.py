"""Small disks that tests may fill."""

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


@contextmanager
def small_disk(folder: Path, kib: int) -> Iterator[Path]:
    """A file system of its own, in memory, at a folder that is there; it may still be in use when the block ends.

    Where this user may not mount one the test is skipped; in CI, where it must be, that is a failure.
    """
    command = ["mount", "-t", "tmpfs", "-o", f"size={kib}k", "evenkeel", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        text = f"this user may not mount a small disk, which takes root: {done.stderr.strip()}"
        if os.environ.get("CI") == "true":
            pytest.fail(text)
        pytest.skip(text)
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)
