"""Runs as a user starts them, as a process of jobs/train.py, and what they left."""

import json
import os
import signal
import subprocess
import sys
import uuid
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

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

    def finish(self) -> "Finished":
        out, err = self.process.communicate(timeout=LIMIT_S)
        return Finished(self.process.returncode, out, err, self.directory, self.mark)

    def after_step(self, step: int) -> None:
        """Returns when this step is visible."""
        reader = self.directory.follow("metrics")
        while not any(line["step"] >= step for line in reader.poll()):
            if self.process.poll() is not None:
                raise AssertionError(f"ended before step {step}: {self.process.communicate()}")
            self.process_pause()

    def process_pause(self) -> None:
        """Waits a moment for the run to go on, or until it ends."""
        try:
            self.process.wait(timeout=0.02)
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
    """Where a test's runs live. `address` is the shared Ray's, or "local" for one of the run's own."""

    folder: Path
    address: str
    started: list[Started] = field(default_factory=list)

    def start(self, changes: dict[str, Any], *overrides: str, name: str = "run") -> Started:
        config = self.folder / f"{name}-{uuid.uuid4().hex[:6]}.json"
        config.write_text(json.dumps(merged(changes)))
        mark = uuid.uuid4().hex
        environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "RAY_ADDRESS")}
        environment |= {"RAY_ADDRESS": self.address, "RAY_AUTH_MODE": "disabled", MARK: mark}
        command = [sys.executable, str(ROOT / "jobs" / "train.py"), "--config", str(config)]
        own = [f"run.name={name}", f"run.storage_path={self.folder / 'runs'}", f"data.path={self.text}", *overrides]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        process = subprocess.Popen([*command, *own], cwd=self.folder, env=environment, text=True, **pipes)
        self.started.append(Started(process, RunDirectory.of(str(self.folder / "runs"), name), mark))
        return self.started[-1]

    def run(self, changes: dict[str, Any], *overrides: str, name: str = "run") -> Finished:
        return self.start(changes, *overrides, name=name).finish()

    @property
    def text(self) -> Path:
        path = self.folder / "text.txt"
        if not path.exists():
            path.write_bytes(bytes(range(32, 127)) * 100)
        return path
