"""Runs as a user starts them, as a process of jobs/train.py, and what they left."""

import json
import os
import signal
import subprocess
import sys
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from evenkeel.store.lease import read_lease
from evenkeel.store.run_directory import RunDirectory

ROOT = Path(__file__).parents[2]
MARK = "EVENKEEL_TEST_MARK"
LIMIT_S = 240

TINY = {
    "run": {"seed": 3},
    "model": {"name": "decoder", "d_model": 32, "layers": 2, "heads": 2, "kv_heads": 1, "seq_len": 16},
    "data": {"name": "text"},
    "train": {"steps": 8, "global_batch": 8, "micro_batch": 2, "learning_rate": 0.01, "warmup_steps": 2},
    "scaling": {"workers": [2, 2], "spares": 0},
    "parallel": {"data": 2, "pipeline": 1, "tensor": 1},
}
"""A decoder over bytes in two pipelines of one stage; a step takes some milliseconds."""


def merged(changes: dict[str, Any]) -> dict[str, Any]:
    """TINY with changes section by section."""
    sections = {**TINY, **changes}
    return {k: {**TINY.get(k, {}), **v} if isinstance(v, dict) else v for k, v in sections.items()}


@dataclass
class Started:
    """A run that was started as a process of its own."""

    process: "subprocess.Popen[str]"
    directory: RunDirectory
    mark: str
    pause_s: float = 0.02

    def finish(self) -> "Finished":
        out, err = self.process.communicate(timeout=LIMIT_S)
        return Finished(self.process.returncode, out, err, self.directory, self.mark)

    def after_step(self, step: int) -> None:
        """Returns when this step is visible."""
        reader = self.directory.follow("metrics")
        self.until(lambda: any(line["step"] >= step for line in reader.poll()))

    def until(self, holds: Callable[[], bool]) -> None:
        """Returns when this holds."""
        while not holds():
            if self.process.poll() is not None:
                raise AssertionError(f"ended too early: {self.process.communicate()}")
            self.process_pause()

    def has_event(self, name: str) -> bool:
        return any(event["event"] == name for event in self.directory.events())

    def controller(self) -> int:
        """The process that holds the lease; the controller's once there are steps."""
        lease = read_lease(self.directory.files)
        assert lease is not None
        return lease.holder.pid

    def pids(self) -> list[int]:
        """Of the members of the last world, by rank."""
        return [member["pid"] for member in self.directory.read_worlds()[-1]["members"]]

    def process_pause(self) -> None:
        """Waits a moment for the run to go on, or until it ends."""
        try:
            self.process.wait(timeout=self.pause_s)
        except subprocess.TimeoutExpired:
            return

    def kill(self) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGKILL)
            self.process.communicate()


@dataclass
class Finished:
    status: int
    out: str
    err: str
    directory: RunDirectory
    mark: str

    @property
    def steps(self) -> list[int]:
        """As they stand in metrics.jsonl, one by one."""
        return [line["step"] for line in self.directory.follow("metrics").poll()]

    def events(self, name: str) -> list[dict[str, Any]]:
        return [event for event in self.directory.events() if event["event"] == name]

    def worlds(self) -> list[dict[str, Any]]:
        return self.directory.read_worlds()


def marked(mark: str) -> list[psutil.Process]:
    """Every live process that was started with this mark in its environment."""
    found: list[psutil.Process] = []
    for process in psutil.process_iter():
        try:
            if process.environ().get(MARK) == mark and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except psutil.Error:
            continue
    return found


@dataclass
class Site:
    """Where a test's runs live.

    Attributes:
        address: of the shared Ray, or "local" for one of the run's own.
        storage: where the run directories are, if not in `folder`; this process reads them with `options`.
    """

    folder: Path
    address: str
    python: str = sys.executable
    storage: str = ""
    options: dict[str, Any] | None = None
    started: list[Started] = field(default_factory=list)

    def start(self, changes: dict[str, Any], *overrides: str, name: str = "run") -> Started:
        config = self.folder / f"{name}-{uuid.uuid4().hex[:6]}.json"
        config.write_text(json.dumps(merged(changes)))
        mark = uuid.uuid4().hex
        environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "RAY_ADDRESS")}
        environment |= {"RAY_ADDRESS": self.address, "RAY_AUTH_MODE": "disabled", "TMPDIR": "/tmp", MARK: mark}
        command = [self.python, str(ROOT / "jobs" / "train.py"), "--config", str(config)]
        storage = self.storage or str(self.folder / "runs")
        own = [f"run.name={name}", f"run.storage_path={storage}", f"data.path={self.text}", *overrides]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        # A group of its own, as a shell or a supervisor would make it.
        apart = {"start_new_session": True, "text": True, **pipes}
        process = subprocess.Popen([*command, *own], cwd=self.folder, env=environment, **apart)
        directory = RunDirectory.of(storage, name, self.options)
        # A look at an object store is some requests, which the run waits for.
        self.started.append(Started(process, directory, mark, 0.2 if "://" in storage else 0.02))
        return self.started[-1]

    def run(self, changes: dict[str, Any], *overrides: str, name: str = "run") -> Finished:
        return self.start(changes, *overrides, name=name).finish()

    def command(self, *words: str) -> "subprocess.CompletedProcess[str]":
        """What a command says that runs without evenkeel on its path."""
        environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
        return subprocess.run(words, cwd=self.folder, env=environment, capture_output=True, text=True, timeout=LIMIT_S)

    @property
    def text(self) -> Path:
        path = self.folder / "text.txt"
        if not path.exists():
            path.write_bytes(bytes(range(32, 127)) * 100)
        return path
