"""Runs as a user starts them, as a process of jobs/train.py or from Python, and what they left."""

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import uuid
from collections.abc import Callable
from contextlib import redirect_stderr
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from evenkeel.config import load_config
from evenkeel.store.lease import read_lease
from evenkeel.store.run_directory import RunDirectory
from evenkeel.trainer import run as train

ROOT = Path(__file__).parents[2]
MARK = "EVENKEEL_TEST_MARK"
LIMIT_S = 240
LOCAL = "local"
"""The address that makes each run start a Ray of its own."""

TINY = {
    "run": {"seed": 3},
    "model": {"name": "decoder", "d_model": 32, "layers": 2, "heads": 2, "kv_heads": 1, "seq_len": 16},
    "data": {"name": "text"},
    "train": {"steps": 8, "global_batch": 8, "micro_batch": 2, "learning_rate": 0.01, "warmup_steps": 2},
    "scaling": {"workers": [2, 2], "spares": 0},
    "parallel": {"data": 2, "pipeline": 1, "tensor": 1, "rebalance": False},
}
"""A decoder over bytes in two pipelines of one stage; a step takes some milliseconds. No work moves by what is measured
of them: runs are compared to the last bit, and worlds are counted."""

ONE: dict[str, Any] = {"scaling": {"workers": [1, 1]}, "parallel": {"data": 1}}
"""A single worker, where it does not matter how many there are: each takes seconds of processor time to start."""
FOREVER: dict[str, Any] = {"train": {"steps": 100_000}, **ONE}
EVERY = 4
SAVING: dict[str, Any] = {"train": {"steps": 16}, "checkpoint": {"every_steps": EVERY}}
SLOWLY: dict[str, Any] = {**SAVING, "emulate": {"slowdown": {0: 10.0}}}
"""The same run, for those who want to come between two steps of it."""


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

    def until_said(self, words: str) -> None:
        """Returns when this was printed; what was printed until then is not in Finished.out."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if words in line:
                return
        raise AssertionError(f"ended without saying {words!r}: {self.process.communicate()}")

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


def steps_in(directory: RunDirectory) -> list[int]:
    return [line["step"] for line in directory.follow("metrics").poll()]


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
        return steps_in(self.directory)

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
        address: the shared Ray's, to which this process is connected, or LOCAL.
        storage: where the run directories are, if not in `folder`; this process reads them with `options`.
    """

    folder: Path
    address: str
    text: Path
    python: str = sys.executable
    storage: str = ""
    options: dict[str, Any] | None = None
    started: list[Started] = field(default_factory=list)

    def start(self, changes: dict[str, Any], *overrides: str, name: str = "run") -> Started:
        """A run with a driver of its own, which can be sent signals."""
        mark = uuid.uuid4().hex
        environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH" and not k.startswith("RAY_")}
        environment |= {"RAY_ADDRESS": self.address, "RAY_AUTH_MODE": "disabled", "TMPDIR": "/tmp", MARK: mark}
        command = [self.python, str(ROOT / "jobs" / "train.py"), "--config", str(self._config(changes, name))]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        # A group of its own, as a shell or a supervisor would make it.
        apart = {"start_new_session": True, "text": True, **pipes}
        process = subprocess.Popen([*command, *self._own(name), *overrides], cwd=self.folder, env=environment, **apart)
        # A look at an object store is some requests, which the run waits for.
        pause_s = 0.2 if "://" in self.storage else 0.02
        self.started.append(Started(process, self._directory(name), mark, pause_s))
        return self.started[-1]

    def run(self, changes: dict[str, Any], *overrides: str, name: str = "run", resume: str = "auto") -> Finished:
        """A whole run. On the shared Ray this process drives it: one of its own would take seconds to start."""
        if self.address == LOCAL:
            return self.start(changes, *overrides, f"--resume={resume}", name=name).finish()
        out, err = io.StringIO(), io.StringIO()
        with redirect_stderr(err):
            config = load_config([self._config(changes, name)], [*self._own(name), *overrides])
            status = train(config, resume=resume, out=out)
        return Finished(status, out.getvalue(), err.getvalue(), self._directory(name), "")

    def copy(self, done: Finished) -> None:
        """Makes what an earlier run left this site's own."""
        shutil.copytree(done.directory.url, self.folder / "runs" / Path(done.directory.url).name)

    def command(self, *words: str) -> "subprocess.CompletedProcess[str]":
        """What a command says that runs without evenkeel on its path."""
        environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
        return subprocess.run(words, cwd=self.folder, env=environment, capture_output=True, text=True, timeout=LIMIT_S)

    def _config(self, changes: dict[str, Any], name: str) -> Path:
        path = self.folder / f"{name}-{uuid.uuid4().hex[:6]}.json"
        path.write_text(json.dumps(merged(changes)))
        return path

    def _own(self, name: str) -> list[str]:
        return [f"run.name={name}", f"run.storage_path={self._storage}", f"data.path={self.text}"]

    def _directory(self, name: str) -> RunDirectory:
        return RunDirectory.of(self._storage, name, self.options)

    @property
    def _storage(self) -> str:
        return self.storage or str(self.folder / "runs")
