"""Ours and the peers as commands: each trains the work in a folder and leaves times and losses of its steps there."""

import json
import os
import shlex
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.process import Running, running
from bench.work import Steps, Work, check_complete
from evenkeel.runtime.cluster import QUIET

JOBS = Path(__file__).resolve().parent.parent
PEERS = JOBS / "peers"
PLATFORM = JOBS.parent / "platform"
LIMIT_S = 240.0
"""For one run, unless it is given more; a run that takes longer gives no measurement."""


@dataclass(frozen=True, slots=True)
class Side:
    """One contender. `run` trains the work in an empty folder; raises BenchError if that gave no measurement.

    Attributes:
        about_s: how long a run takes, roughly, for the estimate that is printed.
    """

    name: str
    about_s: float
    run: Callable[[Path], Steps]


def product(work: Work, name: str = "evenkeel", limit_s: float = LIMIT_S) -> Side:
    """All of ours: jobs/train.py with Ray, controller and heartbeat, measured by what it writes down."""

    def run(folder: Path) -> Steps:
        command = [sys.executable, str(JOBS / "train.py"), "--config", str(work.write(folder))]
        # A Ray of its own, also where one is running already.
        variables = {"RAY_ADDRESS": "local"}
        return _run(command, folder, work, name, variables, lambda: _metrics(folder / "run"), limit_s)

    return Side(name, 30, run)


def static(
    work: Work,
    name: str = "engine alone",
    measures: Sequence[str] = (),
    environment: Mapping[str, str] | None = None,
    layout: Mapping[str, str] | None = None,
) -> Side:
    """The same engine in a fixed layout, with neither controller nor heartbeat nor Ray.

    Args:
        measures: inside its workers; see bench/probe.py.
        environment: how it reaches where its run directory is.
        layout: what is to be other than in the layout that the controller would begin with; see bench/static.py.
    """

    def run(folder: Path) -> Steps:
        out = folder / "steps.jsonl"
        command = [sys.executable, str(JOBS / "bench" / "static.py"), str(work.write(folder)), str(out), *measures]
        command += [word for name, value in (layout or {}).items() for word in (f"--{name}", value)]
        return _run(command, folder, work, name, environment or {}, lambda: _by_step(_lines(out)))

    return Side(name, 20, run)


def static_at_once(works: Sequence[Work], folder: Path) -> tuple[Steps, ...]:
    """The engine alone on each of these works, by itself, all of them at the same time.

    Raises:
        BenchError: if one of them fails, or takes long.
    """
    commands, outputs = [], []
    for number, work in enumerate(works):
        own = folder / f"alone-{number}"
        own.mkdir()
        outputs.append(own / "steps.jsonl")
        script = str(JOBS / "bench" / "static.py")
        commands.append(shlex.join([sys.executable, script, str(work.write(own)), str(outputs[-1])]))
    # One command, which ends with the status of the first that fails.
    together = " & ".join(commands) + " & for one in $(jobs -p); do wait $one || exit; done"
    process = execute(["bash", "-c", together], folder, {})
    found = tuple(Steps(process.began, *_by_step(_lines(output))) for output in outputs)
    for steps, work in zip(found, works, strict=True):
        check_complete(steps, work, "one of several at once")
    return found


def torchrun(name: str, script: str, work: Work, *words: str) -> Side:
    """A peer that is started by torchrun, with more words for it."""

    def run(folder: Path) -> Steps:
        launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={work.workers}"]
        command = [sys.executable, *launch, str(PEERS / script), str(work.write(folder)), str(folder), *words]
        return _run(command, folder, work, name, {}, lambda: _ranks(folder))

    return Side(name, 20, run)


def raytrain(work: Work, name: str = "Ray Train", script: str = "train_raytrain.py") -> Side:
    """Ray Train, which starts a Ray of its own."""

    def run(folder: Path) -> Steps:
        command = [sys.executable, str(PEERS / script), str(work.write(folder)), str(folder)]
        # Without a token, which Ray would leave in the home folder, where it bars other clusters; and with the settings
        # with which ours starts a local Ray, by which the workers get normal priority and more of the cores.
        variables = {**QUIET, "RAY_AUTH_MODE": "disabled"}
        return _run(command, folder, work, name, variables, lambda: _ranks(folder))

    return Side(name, 35, run)


Found = tuple[Mapping[int, float], Mapping[int, float]]


def execute(command: list[str], folder: Path, variables: Mapping[str, str], limit_s: float = LIMIT_S) -> Running:
    """Runs a command to its end, in the environment that all have. Raises BenchError if it fails or takes long."""
    paths = [str(PLATFORM), str(JOBS), str(PEERS), *filter(None, [os.environ.get("PYTHONPATH")])]
    alike = {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": os.pathsep.join(paths)}
    try:
        with running(command, folder / "log", {**alike, **variables}) as process:
            process.wait(limit_s)
    finally:
        for large in (folder / "run" / "checkpoints", folder / "saved", folder / "store"):
            shutil.rmtree(large, ignore_errors=True)
    return process


def _run(
    command: list[str],
    folder: Path,
    work: Work,
    name: str,
    variables: Mapping[str, str],
    read: Callable[[], Found],
    limit_s: float = LIMIT_S,
) -> Steps:
    process = execute(command, folder, variables, limit_s)
    ends, losses = read()
    inside = tuple(line for path in sorted(folder.glob("inside-*.jsonl")) for line in _lines(path))
    run = folder / "run" if (folder / "run").is_dir() else None
    steps = Steps(process.began, ends, losses, process.cpu, run, inside)
    check_complete(steps, work, name)
    return steps


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    if path.exists():
        for line in path.read_text().splitlines():
            yield json.loads(line)


def _metrics(run: Path) -> Found:
    """Of our run directory. A step that is there twice counts by its last line."""
    return _by_step(_lines(run / "metrics.jsonl"))


def _by_step(lines: Iterator[dict[str, Any]]) -> Found:
    ends: dict[int, float] = {}
    losses: dict[int, float] = {}
    for line in lines:
        ends[line["step"]] = line["time"]
        if line["loss"] is not None:
            losses[line["step"]] = line["loss"]
    return ends, losses


def _ranks(folder: Path) -> Found:
    """Of a peer: times of rank 0, as ours are the leader's; the losses of all micro-batches, whoever computed them."""
    ends: dict[int, float] = {}
    losses: dict[int, list[float]] = {}
    for path in sorted(folder.glob("steps-*.jsonl")):
        for line in _lines(path):
            if path.name == "steps-0.jsonl":
                ends[line["step"]] = line["time"]
            losses.setdefault(line["step"], []).extend(line["losses"])
    return ends, {step: sum(values) / len(values) for step, values in losses.items() if values}
