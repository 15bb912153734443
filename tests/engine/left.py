"""What processes use, and what they leave behind, read from /proc."""

import contextlib
import os
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from processes import run_processes

SHARED = Path("/dev/shm")


@dataclass(frozen=True)
class Usage:
    """Of one process: open file descriptors, sockets among them, threads, and resident memory in KiB."""

    files: int
    sockets: int
    threads: int
    resident_kib: int

    @property
    def line(self) -> str:
        resident = f"{self.resident_kib / 1024:.1f} MiB"
        return f"{self.files} descriptors ({self.sockets} sockets), {self.threads} threads, {resident}"


def usage(pid: int | str = "self") -> Usage:
    """Raises OSError if there is no such process."""
    opened = _opened(pid)
    status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    sockets = sum(name.startswith("socket:") for name in opened)
    return Usage(len(opened), sockets, int(status["Threads"]), int(status["VmRSS"].split()[0]))


def shared_memory(pid: int) -> set[str]:
    """Files of shared memory that the process has open or mapped."""
    lines = Path(f"/proc/{pid}/maps").read_text().splitlines()
    mapped = [line.split(maxsplit=5)[5] for line in lines if f"{SHARED}/" in line]
    return {name.removesuffix(" (deleted)") for name in [*mapped, *_opened(pid)] if name.startswith(f"{SHARED}/")}


def _opened(pid: int | str) -> list[str]:
    names = []
    for number in os.listdir(f"/proc/{pid}/fd"):
        with contextlib.suppress(FileNotFoundError):  # the one that lists the folder is gone by now
            names.append(os.readlink(f"/proc/{pid}/fd/{number}"))
    return names


def alive(pid: int) -> bool:
    """Whether it runs, or has ended and was not waited for."""
    return Path(f"/proc/{pid}").exists()


@contextlib.contextmanager
def nothing_left() -> Iterator[None]:
    """The block leaves no thread and no file descriptor in this process."""
    run_processes(abs, 1)  # the server that processes fork from starts with the first one, and stays
    threads, files = set(threading.enumerate()), usage().files
    yield
    assert [thread.name for thread in threading.enumerate() if thread not in threads] == []
    assert usage().files <= files
