"""That a disk which could not be filled does not go unnoticed."""

import os
from pathlib import Path

import pytest
from disks import small_disk


@pytest.mark.parametrize(("ci", "outcome"), [("true", pytest.fail.Exception), ("", pytest.skip.Exception)])
def test_who_may_not_mount_one_is_told_and_in_ci_that_is_a_failure(
    ci: str, outcome: type[BaseException], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "mount"
    program.write_text("#!/bin/sh\necho 'must be superuser to use mount.' >&2\nexit 1\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("CI", ci)
    with pytest.raises(outcome, match="takes root: must be superuser"), small_disk(tmp_path, 1024):
        raise AssertionError("there is none")
