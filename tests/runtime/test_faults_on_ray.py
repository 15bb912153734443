"""Cells of the fault matrix through the whole product: a job on real Ray, with the faults in its configuration."""

import json
from dataclasses import dataclass
from typing import Any

import psutil
import pytest
from ray_runs import Finished, Site

STEPS = 24
WORKERS = 4
CONFIG: dict[str, Any] = {
    "train": {"steps": STEPS},
    "scaling": {"workers": [WORKERS, WORKERS], "spares": 2},
    "parallel": {"data": 2, "pipeline": 2, "tensor": 1},
}
GONE_S = 30
"""For Ray to end the processes of a run that is over."""


@dataclass(frozen=True)
class Fault:
    step: int
    phase: str
    rank: int
    kind: str

    @property
    def fatal(self) -> bool:
        return self.kind != "exception" or self.phase == "commit"


RUNS = {
    "kill, segv": (Fault(6, "forward", 1, "kill"), Fault(16, "commit", 2, "segv")),
    "stop, kill": (Fault(6, "reduce", 3, "stop"), Fault(16, "after_vote", 0, "kill")),
    "in a recovery": (Fault(6, "backward", 0, "kill"), Fault(6, "recovery", 3, "kill")),
    "exceptions": (Fault(6, "before_vote", 2, "exception"), Fault(16, "commit", 1, "exception")),
}


@pytest.mark.soak
@pytest.mark.timeout(900)
def test_faults_change_nothing_and_leave_nothing(site: Site, request: pytest.FixtureRequest) -> None:
    truth = site.run(CONFIG, name="undisturbed")
    assert (truth.status, truth.err) == (0, "")
    problems = []
    for number, (name, faults) in enumerate(RUNS.items()):
        planned = [{"step": f.step, "phase": f.phase, "target": f"rank:{f.rank}", "kind": f.kind} for f in faults]
        done = site.run({**CONFIG, "faults": planned}, name=f"run{number}")
        problem = problem_of(done, truth, faults) or left_of(done)
        heals = {e["step"]: e["total"] for e in done.events("incident")}
        for fault in faults:
            line = {
                "table": "ray", "kind": fault.kind, "phase": fault.phase, "target": f"rank {fault.rank}",
                "problem": problem, "redone": len(done.steps) - len(set(done.steps)),
                "heal_s": sum(s for step, s in heals.items() if fault.step <= step <= fault.step + 1),
            }  # fmt: skip
            request.node.user_properties.append(("fault", json.dumps(line)))
        problems += [f"{name}: {problem}"] if problem else []
    assert problems == []


def problem_of(done: Finished, truth: Finished, faults: tuple[Fault, ...]) -> str:
    """What differs from the run without faults, or from who was to be lost; "" if nothing does."""
    if (done.status, done.err) != (0, ""):
        return f"exit status {done.status}: {done.err}"
    if done.steps != list(range(1, STEPS + 1)):
        return f"committed steps are {done.steps}"
    same = ("loss", "grad_norm", "tokens", "samples", "vote")
    for line, other in zip(done.directory.metrics(), truth.directory.metrics(), strict=True):
        if any(line[key] != other[key] for key in same):
            return f"step {line['step']} is not as without faults"
    if final(done) != final(truth):
        return "other parameters than without faults"
    return problem_of_members(done, faults)


def problem_of_members(done: Finished, faults: tuple[Fault, ...]) -> str:
    first, last = done.worlds()[0]["members"], done.worlds()[-1]["members"]
    dead = {fault.rank for fault in faults if fault.fatal}
    for before, after in zip(first, last, strict=True):
        same = (before["worker_id"], before["pid"]) == (after["worker_id"], after["pid"])
        if same == (before["rank"] in dead):
            return f"rank {before['rank']} was pid {before['pid']} and is pid {after['pid']}"
    lost = {event["worker_id"] for event in done.events("worker_lost")}
    expected = {first[rank]["worker_id"] for rank in dead}
    return "" if lost == expected else f"lost {sorted(lost)} instead of {sorted(expected)}"


def final(done: Finished) -> bytes | None:
    return done.directory.files.read("final/model.safetensors")


def left_of(done: Finished) -> str:
    """Actors are looked for by the fixture, at the end."""
    import ray

    groups = [g for g in ray.util.placement_group_table().values() if g["state"] != "REMOVED"]
    if groups:
        return f"placement groups are left: {groups}"
    pids = [event["pid"] for event in done.events("worker_started")]
    _, left = psutil.wait_procs([psutil.Process(pid) for pid in pids if psutil.pid_exists(pid)], timeout=GONE_S)
    return f"processes are left: {left}" if left else ""
