"""One run through fifty deaths: the two that live through all of them hold no more at the end than at the beginning."""

import json
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from left import Usage, nothing_left, usage
from matrix import FIRST, PAIRS, SPACING, Cell
from matrix_runs import Watcher, make_job, play_cells, undisturbed

from evenkeel.engine.faults import STEP_PHASES
from evenkeel.engine.local import LocalRun

KILLS = 50
SETTLED = 10
"""Kills after which allocators and thread pools have grown to their size."""
GROWTH_KIB = 4 * 1024


@dataclass
class Measuring(Watcher):
    """Measures ranks 0 and 2 and this process before each kill, and when the run has ended."""

    seen: dict[str, list[Usage]] = field(default_factory=dict)

    def _look(self, run: LocalRun) -> None:
        super()._look(run)
        for rank in (0, 2):
            self.seen.setdefault(f"rank {rank}", []).append(usage(run.fleet.pid(run.member(rank))))
        self.seen.setdefault("parent", []).append(usage())


@pytest.mark.soak
@pytest.mark.timeout(900)
def test_survivors_of_fifty_kills_leak_nothing(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    cells = [
        Cell("kill", STEP_PHASES[i % len(STEP_PHASES)], f"kill {i}", (1 + 2 * (i % 2),)) for i in range(KILLS)
    ]  # fmt: skip
    steps = FIRST + SPACING * KILLS
    for name in ("truth", "run"):
        (tmp_path / name).mkdir()
    truth = undisturbed(tmp_path / "truth", PAIRS, steps=steps)
    job = make_job(tmp_path / "run", PAIRS, cells, steps=steps)
    watcher = Measuring(job, KILLS, SPACING, PAIRS.workers + 1)
    with nothing_left():
        results = play_cells(job, PAIRS, cells, truth, watcher)
    assert [r.text for r in results if r.problem] == []
    for name, seen in watcher.seen.items():
        assert len(seen) == KILLS + 1
        settled, last = seen[SETTLED], seen[-2]
        line = {"who": name, "kills": KILLS, "before": seen[0].line, "settled": settled.line, "after": last.line}
        request.node.user_properties.append(("leak", json.dumps(line)))
        assert last.files <= settled.files
        assert last.sockets <= settled.sockets
        assert last.threads <= settled.threads
        assert last.resident_kib <= settled.resident_kib + GROWTH_KIB
