"""Who runs a run, and whether another may: lease.json.

The journal is the fence: of two controllers that both think that they hold the lease, only one can write the next
entry, so no harm comes of a lease that is wrong. It is there to tell a second submission who is first before it starts
anything, and to let it go on at once, or after LEASE_S, where the first is dead.

**Tenures.** Who holds the lease is settled by files lease/000001.json, lease/000002.json, …, each created only if
absent and then never changed or removed, like the journal's: the highest is the holder's. Two takers that found tenure
n dead both try to create n + 1; one does, the other finds a lease that is new to it. So nothing but Files.create has to
be atomic, which on S3 is one small conditional PUT: overwriting on a condition (If-Match) is not to be had everywhere.

**lease.json** is what the holder shows: its tenure with the time of its last renewal, replaced whole, so that a reader
never sees half of one. A holder that was stopped (SIGSTOP, a slow link) between looking and writing may put its own
over its successor's, once. Therefore lease.json counts only if it is of the highest tenure; before that holder has
shown anything, or when it was overwritten so, the tenure's own file stands in, until the next renewal. A holder has
lost as soon as the next tenure exists, which it looks for whenever it renews.

**Dead** is a holder for certain if its process is gone, and nobody is left who would start it again: a controller is an
actor that Ray restarts, so the lease also names the process of its Ray that does so (the GCS). Within that Ray its
process is enough, for there Ray itself tells whether the actor is being restarted.

**Time.** Clocks of two hosts are not compared: an observer waits for the lease to change, by its own monotonic clock,
which counts from the end of its first look to the beginning of its last.
"""

import json
import os
import socket
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from evenkeel.core.codec import CodecError, dump, load
from evenkeel.store.errors import StoreError
from evenkeel.store.files import Files
from evenkeel.store.journal import check_format
from evenkeel.store.untrusted import LATEST, MAX_NUMBER, is_number, parse_json, short

LEASE_S = 14.0
"""A lease that did not change for so long is nobody's.

A second submission has it after 15 s at most: one of them is left to the store, for the looks and for the taking.
"""

RENEW_S = 3.0
"""Several to a lease, so that a slow store does not cost it; a second submission is refused within one."""

LOOK_S = 0.5
"""Between two looks of an observer; the last pause is shorter, and ends when the lease may have expired."""

FORMAT = 2
"""2 names ray_pid and ray_start; without them nobody would start the holder again."""
SHOWN = "lease.json"
FOLDER = "lease"
ELSEWHERE = -1
"""As ray_pid: on another host, or out of sight."""


class LeaseHeld(StoreError):  # noqa: N818 - it says how things are
    """Another cluster runs this run; names host, process and start."""


class LeaseLost(StoreError):  # noqa: N818 - it says who one is now
    """Another process has taken the lease in place of this one."""


@dataclass(frozen=True, slots=True)
class Holder:
    """A process that runs, or would run, a run.

    Attributes:
        cluster: identity of its Ray cluster.
        boot_id: of the kernel.
        pid_namespace: in which `pid` counts: containers of one host share the boot, and maybe the name, but not this.
        process_start: in clock ticks since boot; with the pid it means one process and never another.
        ray_pid, ray_start: of the process that would start this one again; 0 if there is none, or ELSEWHERE.
    """

    cluster: str
    host: str
    boot_id: str
    pid_namespace: str
    pid: int
    process_start: int
    ray_pid: int = 0
    ray_start: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.pid < 2**31 or not ELSEWHERE <= self.ray_pid < 2**31:
            raise ValueError(f"pid is {self.pid} and ray_pid {self.ray_pid}, one of which is that of no process")

    @classmethod
    def this(cls, cluster: str, ray_pid: int = 0) -> "Holder":
        """The calling process."""
        pid = os.getpid()
        boot_id = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        namespace = os.readlink("/proc/self/ns/pid")
        ray_start = _stat(ray_pid)[1] if ray_pid > 0 else 0
        return cls(cluster, socket.gethostname(), boot_id, namespace, pid, _stat(pid)[1], ray_pid, ray_start)

    def is_dead(self, observer: "Holder") -> bool:
        """Whether it is gone for certain, and for good; False also if the observer has no way to know."""
        if (self.host, self.boot_id, self.pid_namespace) != (observer.host, observer.boot_id, observer.pid_namespace):
            return False
        if not _is_gone(self.pid, self.process_start):
            return False
        if self.ray_pid == 0 or self.cluster == observer.cluster:
            return True
        return self.ray_pid != ELSEWHERE and _is_gone(self.ray_pid, self.ray_start)


_OF_FORMAT_1 = {"ray_pid": 0, "ray_start": 0}


@dataclass(frozen=True, slots=True)
class Lease:
    """lease.json. `start` (of the tenure) and `renewed` are unix seconds, by the holder's clock.

    Attributes:
        epoch: of the holder's controller; 0 while there is none yet, or it has not read the journal.
        released: the holder has ended and waits for nobody.
        nonce: no two takers write the same (Files.create).
    """

    tenure: int
    holder: Holder
    epoch: int
    start: float
    renewed: float
    released: bool
    nonce: str

    def __post_init__(self) -> None:
        if not 0 <= self.start < LATEST:
            raise ValueError(f"start is {self.start}, which is no time of this age")
        if not is_number(self.tenure) or not is_number(self.epoch):
            raise ValueError(f"tenure {self.tenure} or epoch {self.epoch} is not 0 to {MAX_NUMBER}")

    @property
    def who(self) -> str:
        start = datetime.fromtimestamp(self.start, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
        return f"process {self.holder.pid} on host {short(self.holder.host, 100)}, started {start}"

    def to_json(self) -> bytes:
        values = dump(self, Lease)
        return json.dumps({"format": FORMAT, **values.pop("holder"), **values}, indent=2).encode() + b"\n"

    @classmethod
    def from_json(cls, data: bytes, where: str) -> "Lease":
        """Raises StoreError, naming the file, if it is none or of a newer format."""
        try:
            values: dict[str, Any] = dict(check_format(parse_json(data), FORMAT, where))
            del values["format"]
            holder = {name: values.pop(name, _OF_FORMAT_1.get(name)) for name in Holder.__slots__}
            lease: Lease = load({**values, "holder": holder}, Lease)
        except (CodecError, ValueError) as error:
            raise StoreError(f"{where}: damaged ({short(error)}); remove it if nobody runs this run") from None
        return lease


@dataclass(frozen=True, slots=True)
class Decision:
    action: Literal["take", "keep", "attach", "wait", "refuse"]
    reason: str


def decide(lease: Lease | None, me: Holder, dead: bool, changed: bool, unchanged_s: float) -> Decision:
    """What one who wants to run this run is to do.

    Args:
        dead: the holder is gone for certain, as Holder.is_dead has it.
        changed: the lease has changed since the asker looked first.
        unchanged_s: how long the asker has seen it as it is.
    """
    if lease is None:
        return Decision("take", "nobody runs it")
    if lease.released:
        return Decision("take", f"{lease.who}, has ended")
    if lease.holder == me:
        return Decision("keep", "an earlier attempt of this process has taken it, though the store failed then")
    if dead:
        return Decision("take", f"{lease.who}, is dead")
    if lease.holder.cluster == me.cluster:
        return Decision("attach", f"{lease.who}, runs it in this cluster")
    if changed:
        return Decision("refuse", f"{lease.who}, runs it in another cluster")
    if unchanged_s >= LEASE_S:
        return Decision("take", f"{lease.who}, has not been heard of for {LEASE_S:g} s")
    return Decision("wait", f"{lease.who}, may be alive")


def read_lease(files: Files) -> Lease | None:
    """The newest lease, whether its holder lives or not; None if the run never had one."""
    numbers = [int(n[:-5]) for n in files.names(FOLDER) if n.endswith(".json") and n[:-5].isdecimal()]
    newest = max(numbers, default=0)
    shown = _read(files, SHOWN)
    return shown if shown is not None and shown.tenure >= newest else _read(files, _file(newest))


class Watch:
    """The lease as an observer sees it from now on, and for how long it has not changed, by the observer's clock.

    Attributes:
        lease: the newest when it was looked at last, whether its holder lives or not; None if the run never had one.
        changed: it has, since the first look.
        unchanged_s: since it was first seen as it is, up to the time when the last look began: what a slow store
            answers may be as old as the question.
    """

    def __init__(self, files: Files, clock: Callable[[], float] = time.monotonic) -> None:
        self._files, self._clock = files, clock
        self.lease = read_lease(files)
        self.changed = False
        self.unchanged_s = 0.0
        self._since = clock()

    def look(self) -> None:
        """Raises as `read_lease`."""
        asked = self._clock()
        lease = read_lease(self._files)
        if lease == self.lease:
            self.unchanged_s = asked - self._since
        else:
            self.lease, self.changed, self.unchanged_s, self._since = lease, True, 0.0, self._clock()

    @property
    def pause_s(self) -> float:
        """Until the next look, which is not later than the lease may expire."""
        return max(0.0, min(LOOK_S, self._since + LEASE_S - self._clock()))


class Tenure:
    """A lease that is held by this process.

    `renew` and `release` take as long as the store does: for a loop that must go on, call them in a thread.
    """

    def __init__(self, files: Files, lease: Lease, reason: str) -> None:
        self.lease = lease
        self.reason = reason
        """Why it could be taken."""
        self._files = files
        self._renewed = float("-inf")

    def due(self, now: float) -> bool:
        """Whether to renew; `now` by time.monotonic()."""
        return now - self._renewed >= RENEW_S

    def renew(self, epoch: int | None = None) -> None:
        """Shows that the holder lives.

        Args:
            epoch: of its controller, which is shown from now on.

        Raises:
            LeaseLost: somebody else holds it.
            StoreError: the store failed. The lease may expire by that; the next renewal tells, until then go on.
        """
        self._renewed = time.monotonic()
        lease = self.lease if epoch is None else replace(self.lease, epoch=epoch)
        self._show(replace(lease, renewed=time.time()))

    def release(self) -> None:
        """Lets the next one take it at once. Raises as `renew` does."""
        self._show(replace(self.lease, renewed=time.time(), released=True))

    def check(self) -> None:
        """Raises LeaseLost if somebody else holds it. From any thread."""
        successor = _read(self._files, _file(self.lease.tenure + 1))
        if successor is not None:
            raise LeaseLost(f"{self._files.where(SHOWN)}: {successor.who}, has taken it over")

    def _show(self, lease: Lease) -> None:
        self.check()
        self._files.replace(SHOWN, lease.to_json())
        self.lease = lease


def acquire(
    files: Files, me: Holder, wait: Callable[[float], bool], clock: Callable[[], float] = time.monotonic
) -> Tenure | None:
    """The lease, or None if it is held within this very cluster, whose controller is to be attached to.

    Takes up to LEASE_S, and what the store takes, where the holder is not known to be dead.

    Args:
        wait: returns after so many seconds, or earlier and True to give up: the `wait` of a threading.Event.

    Raises:
        LeaseHeld: by a process of another cluster that is alive.
        StoreError: if the store fails, or lease.json is damaged or of a newer format.
    """
    return _acquire(files, me, wait, clock, attach=True)


def succeed(files: Files, me: Holder, wait: Callable[[float], bool]) -> Tenure:
    """As `acquire`, for one who knows that in this cluster nobody else runs it: its Ray says so by the actor's name.

    A controller takes over so from the driver that started it, or from its own life before.
    """
    tenure = _acquire(files, me, wait, time.monotonic, attach=False)
    assert tenure is not None
    return tenure


def _acquire(
    files: Files, me: Holder, wait: Callable[[float], bool], clock: Callable[[], float], attach: bool
) -> Tenure | None:
    watch = Watch(files, clock)
    while True:
        seen = watch.lease
        dead = seen is not None and seen.holder.is_dead(me)
        decision = decide(seen, me, dead, watch.changed, watch.unchanged_s)
        match decision.action:
            case "attach" if attach:
                return None
            case "keep" if seen:
                return _shown(files, seen, decision.reason)
            case "take" | "attach":
                if lease := _take(files, me, seen):
                    return _shown(files, lease, decision.reason)
            case "refuse":
                raise LeaseHeld(_refusal(files, decision.reason))
        if wait(watch.pause_s):
            raise LeaseHeld(_refusal(files, decision.reason))
        watch.look()


def _take(files: Files, me: Holder, old: Lease | None) -> Lease | None:
    """The tenure after the old one; None if somebody else was faster."""
    now = time.time()
    lease = Lease(1 + (old.tenure if old else 0), me, 0, now, now, False, uuid.uuid4().hex)
    return lease if files.create(_file(lease.tenure), lease.to_json()) else None


def _shown(files: Files, lease: Lease, reason: str) -> Tenure:
    tenure = Tenure(files, lease, reason)
    tenure.renew()
    return tenure


def _refusal(files: Files, reason: str) -> str:
    how = "by Ctrl-C or SIGTERM to its command (given again in its cluster it attaches; Ray restarts what is killed)"
    return f"{files.where()}: {reason}; stop that one first, {how}, or choose another run.name"


def _read(files: Files, name: str) -> Lease | None:
    data = files.read(name)
    return None if data is None else Lease.from_json(data, files.where(name))


def _file(tenure: int) -> str:
    return f"{FOLDER}/{tenure:06d}.json"


def _stat(pid: int) -> tuple[str, int]:
    """State and start of a process. Raises FileNotFoundError or ProcessLookupError if there is none to be seen."""
    # The second field is the name in parentheses, in which anything may stand.
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return fields[0], int(fields[19])


def _is_gone(pid: int, process_start: int) -> bool:
    try:
        state, start = _stat(pid)
    except (FileNotFoundError, ProcessLookupError):
        return not _answers(pid)
    return state in "ZX" or start != process_start


def _answers(pid: int) -> bool:
    """Whether there is such a process; /proc may hide those of other users."""
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True
