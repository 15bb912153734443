"""That a server which is not there does not go unnoticed."""

import os
from pathlib import Path

import pytest
from servers import CEPH_MISSING, CEPH_PROGRAMS, Ceph, require_ceph


@pytest.mark.parametrize(("ci", "outcome"), [("true", pytest.fail.Exception), ("", pytest.skip.Exception)])
def test_what_is_not_installed_is_told_and_in_ci_that_is_a_failure(
    ci: str, outcome: type[BaseException], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in set(CEPH_PROGRAMS) - {"ceph-osd", "radosgw"}:
        _program(tmp_path / name, "")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CI", ci)
    with pytest.raises(outcome, match=f"^not installed: radosgw, ceph-osd; get them with: {CEPH_MISSING}$"):
        require_ceph()


@pytest.mark.parametrize("ci", ["true", ""])
@pytest.mark.parametrize(
    ("called_with", "said"),
    [("--mkfs", r"ceph-mon --mkfs -i a .*: no room"), ("-f", r"ended with 7: radosgw -f -n client.rgw: no room")],
    ids=["is not made", "does not run"],
)
def test_one_that_does_not_start_is_a_failure_everywhere(
    ci: str, called_with: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    programs, folder = tmp_path / "bin", tmp_path / "ceph"
    programs.mkdir()
    for name in CEPH_PROGRAMS:
        _program(programs / name, f'case "$1" in {called_with}) echo no room >&2; exit 7;; esac')
    monkeypatch.setenv("PATH", f"{programs}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("CI", ci)
    with pytest.raises(AssertionError, match=said):
        Ceph(folder)
    assert not folder.exists(), "nothing is left behind"


def _program(path: Path, script: str) -> None:
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
