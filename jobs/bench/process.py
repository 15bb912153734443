"""One measured command: bounded in time, its CPU seconds counted, and no process of it left behind."""

import os
import signal
import subprocess
import threading
import time
import uuid
from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

MARK = "EVENKEEL_BENCH_RUN"
"""In the environment of every process of a measured command: daemons that leave its session are found by it too."""

SAMPLE_S = 0.5
END_S = 10.0
QUIET_CORES = 0.3
TICKS = os.sysconf("SC_CLK_TCK")


class BenchError(RuntimeError):
    """A run that gave no measurement; the message says why."""


@dataclass
class CpuSeries:
    """CPU seconds used so far, by the command's processes and by the whole machine, at unix times."""

    times: list[float] = field(default_factory=list)
    own: list[float] = field(default_factory=list)
    machine: list[float] = field(default_factory=list)

    def own_between(self, start: float, stop: float) -> float | None:
        """CPU seconds of the command in a stretch of time; None if it was not watched for all of it."""
        return _difference(self.times, self.own, start, stop)

    def foreign_cores(self, start: float, stop: float) -> float | None:
        """How many cores others kept busy meanwhile, on average; small ones of either sign are the counters' grain."""
        own = self.own_between(start, stop)
        machine = _difference(self.times, self.machine, start, stop)
        return None if own is None or machine is None else (machine - own) / (stop - start)


def _difference(times: Sequence[float], values: Sequence[float], start: float, stop: float) -> float | None:
    if not times or start < times[0] or stop > times[-1] or start >= stop:
        return None
    return _at(times, values, stop) - _at(times, values, start)


def _at(times: Sequence[float], values: Sequence[float], t: float) -> float:
    i = max(1, bisect_left(times, t))
    share = (t - times[i - 1]) / (times[i] - times[i - 1])
    return values[i - 1] + share * (values[i] - values[i - 1])


class Running:
    """A command in a session of its own. `began` is the unix time at which it was given."""

    def __init__(self, command: Sequence[str], log: Path, variables: Mapping[str, str]) -> None:
        self.cpu = CpuSeries()
        self._mark = uuid.uuid4().hex
        self._log = log
        self._used: dict[int, float] = {}
        self._known: dict[int, str] = {}
        self._over = threading.Event()
        self._watcher = threading.Thread(target=self._watch, name="cpu", daemon=True)
        environment = {**os.environ, **variables, MARK: self._mark}
        with log.open("ab") as out:
            self.began = time.time()
            self._process = subprocess.Popen(
                command, env=environment, stdin=subprocess.DEVNULL, stdout=out, stderr=out, start_new_session=True
            )
        self._watcher.start()

    def wait(self, limit_s: float) -> None:
        """Raises BenchError if the command takes longer or does not end with 0."""
        try:
            status = self._process.wait(limit_s)
        except subprocess.TimeoutExpired:
            raise BenchError(f"took more than {limit_s:.0f} s: {self._tail()}") from None
        if status:
            raise BenchError(f"exit status {status}: {self._tail()}")

    def end(self) -> None:
        """Ends every process of the command, daemons included, each by its id."""
        self._over.set()
        self._watcher.join()
        for number in (signal.SIGTERM, signal.SIGKILL):
            deadline = time.monotonic() + END_S
            for pid in self._pids():
                with suppress(ProcessLookupError):
                    os.kill(pid, number)
            while self._pids() and time.monotonic() < deadline:
                self._process.poll()
                time.sleep(0.05)
        self._process.wait()

    def _tail(self) -> str:
        lines = [line for line in self._log.read_text(errors="replace").splitlines() if line.strip()]
        return f"{lines[-1][:300] if lines else 'no output'} (log: {self._log})"

    def _pids(self) -> list[int]:
        return [pid for pid in _all_pids() if self._is_ours(pid)]

    def _is_ours(self, pid: int) -> bool:
        """By its environment. Ray's workers overwrite theirs with a title: then by what was seen of it before."""
        started = _started(pid)
        if started is None:
            return False
        if self._known.get(pid) != started and _has_mark(pid, self._mark):
            self._known[pid] = started
        return self._known.get(pid) == started

    def _watch(self) -> None:
        while True:
            self._sample()
            if self._over.wait(SAMPLE_S):
                return

    def _sample(self) -> None:
        for pid in self._pids():
            used = _cpu_s(pid)
            if used is not None:
                self._used[pid] = used
        self.cpu.own.append(sum(self._used.values()))
        self.cpu.machine.append(_machine_cpu_s())
        self.cpu.times.append(time.time())


@contextmanager
def running(command: Sequence[str], log: Path, variables: Mapping[str, str]) -> Iterator[Running]:
    """Starts a command; on leaving, nothing of it runs any more."""
    process = Running(command, log, variables)
    try:
        yield process
    finally:
        process.end()


def wait_quiet(limit_s: float) -> float:
    """Waits until others keep less than QUIET_CORES busy, at most `limit_s`. Returns the cores busy at last."""
    deadline = time.monotonic() + limit_s
    while True:
        before, since = _machine_cpu_s(), time.monotonic()
        time.sleep(1.0)
        busy = (_machine_cpu_s() - before) / (time.monotonic() - since)
        if busy < QUIET_CORES or time.monotonic() >= deadline:
            return busy


def _all_pids() -> list[int]:
    return [int(name) for name in os.listdir("/proc") if name.isdigit()]


def _has_mark(pid: int, mark: str) -> bool:
    try:
        return f"{MARK}={mark}".encode() in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:
        return False


def _stat(pid: int) -> list[str] | None:
    """Fields of /proc/PID/stat from the state on; None if the process is gone or a zombie."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] == "Z" else fields


def _cpu_s(pid: int) -> float | None:
    """User and system time, without that of children, who count for themselves. None if the process is gone."""
    fields = _stat(pid)
    return None if fields is None else (int(fields[11]) + int(fields[12])) / TICKS


def _started(pid: int) -> str | None:
    """When the process began, in ticks since boot: an id may be used again, both together are not."""
    fields = _stat(pid)
    return None if fields is None else fields[19]


def _machine_cpu_s() -> float:
    """Of everybody: user, nice, system, interrupts and what the hypervisor took; not idle, not waiting for a disk."""
    total, *_ = Path("/proc/stat").read_text().splitlines()
    user, nice, system, _, _, irq, softirq, steal = map(int, total.split()[1:9])
    return (user + nice + system + irq + softirq + steal) / TICKS
