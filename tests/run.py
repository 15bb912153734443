"""Runs every test that needs no GPU, group by group, and prints how long each group took.

Within a group the tests are shared out over the cores by pytest-xdist; see conftest.py for what stays together.
"""

import os
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from dataclasses import dataclass
from pathlib import Path

TESTS = Path(__file__).parent
PURE = "core, plan, control, sim"
GROUPS = {"sim": PURE, "scripts": PURE, "unit": "house, config, rest", "cluster": "runtime"}
"""By folder, where a group is not called like it."""
NO_TESTS_COLLECTED = 5
MOST_PROCESSES = 4
"""Many tests start several processes of their own."""


@dataclass(frozen=True)
class Result:
    passed: int
    failed: int
    skipped: int
    seconds: float
    status: int

    @property
    def counts(self) -> str:
        return f"{self.passed} passed, {self.failed} failed, {self.skipped} skipped"


def group_of(test: Path) -> str:
    """The pure parts stand apart from the tests of the configuration, the commands and the house."""
    pure = test.parent.name == "unit" and test.name.startswith(("test_core_", "test_plan_", "test_control_"))
    return PURE if pure else GROUPS.get(test.parent.name, test.parent.name)


def run_group(tests: list[str]) -> Result:
    """Runs pytest over the files; its own output goes to the terminal, the counts come from its report."""
    begun = time.monotonic()
    with tempfile.TemporaryDirectory() as scratch:
        report = Path(scratch) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-q", "-m", "not soak and not gpu", f"--junitxml={report}"]
        shared_out = [f"--numprocesses={min(MOST_PROCESSES, len(os.sched_getaffinity(0)))}", "--dist=loadscope"]
        status = subprocess.run([*command, *shared_out, *tests], cwd=TESTS.parent).returncode
        seconds = time.monotonic() - begun
        if status == NO_TESTS_COLLECTED:
            return Result(0, 0, 0, seconds, 0)
        if not report.exists():
            return Result(0, 1, 0, seconds, status)
        suites = list(ElementTree.parse(report).iter("testsuite"))
    total, failures, errors, skipped = (
        sum(int(s.get(name, "0")) for s in suites) for name in ("tests", "failures", "errors", "skipped")
    )
    failed = max(failures + errors, 1 if status else 0)
    return Result(max(0, total - failures - errors - skipped), failed, skipped, seconds, status)


def main() -> int:
    groups: dict[str, list[str]] = {}
    for test in sorted(set(TESTS.glob("*/test_*.py")) - set(TESTS.glob("gpu/*"))):
        groups.setdefault(group_of(test), []).append(str(test.relative_to(TESTS.parent)))
    results: dict[str, Result] = {}
    for name, tests in groups.items():
        print(f"\n=== {name}", flush=True)
        results[name] = run_group(tests)
    print("\n=== summary")
    for name, result in results.items():
        print(f"{name:25} {result.seconds:7.1f} s   {result.counts}")
    values = results.values()
    total = Result(
        sum(r.passed for r in values),
        sum(r.failed for r in values),
        sum(r.skipped for r in values),
        sum(r.seconds for r in values),
        max((r.status for r in values), default=1),
    )
    print(f"{'all':25} {total.seconds:7.1f} s")
    print(total.counts)
    return 1 if total.status else 0


if __name__ == "__main__":
    sys.exit(main())
