"""What processes of their own do in the tests of the store; apart from these, so that they start quickly."""

import os
import random
import signal
import threading
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

from evenkeel.store.files import Files, open_files
from evenkeel.store.lease import LOOK_S, Holder, LeaseHeld, LeaseLost, acquire

PATIENCE_S = 60.0
ROUNDS = 20

PART = 5 << 20  # the least that S3 takes as a part of an upload that is not the last
PIECE = 1 << 20
DATA = random.Random(0).randbytes(2 * PART + PIECE)  # two whole parts and a rest


# ------------------------------------------------------------ uploads


def upload(files: Files, name: str, pause_at: int = -1, pause: Callable[[], None] = lambda: None) -> None:
    """Writes DATA; before the piece `pause_at`, or the end, something happens."""
    with files.stream(name) as sink:
        for i in range(0, len(DATA), PIECE):
            if i // PIECE == pause_at:
                pause()
            sink.write(memoryview(DATA)[i : i + PIECE])
        if pause_at * PIECE >= len(DATA):
            pause()


def upload_and_die(root: str, options: dict[str, Any]) -> None:
    upload(open_files(root, options), "c/part", 8, lambda: os.kill(os.getpid(), signal.SIGKILL))


# ------------------------------------------------------------ leases


def at_once(seconds: float) -> bool:
    raise AssertionError("waited")


def briefly(seconds: float) -> bool:
    """In place of the pause between two looks, so that the test looks more often."""
    return threading.Event().wait(seconds / 50)


def hold(root: str, pipe: "Connection[Any, Any]") -> None:
    """Holds the lease until it is lost or the other end of the pipe is closed."""
    tenure = acquire(open_files(root), Holder.this("cluster-a"), at_once)
    assert tenure is not None
    pipe.send(tenure.lease)
    try:
        while not pipe.poll(0.02):
            tenure.renew()
            pipe.send("renewed")
    except LeaseLost as error:
        pipe.send(str(error))


def race(root: str, cluster: str, start: Any, end: Any, pipe: "Connection[Any, Any]") -> None:
    """In each round: takes the lease of a run, or is told who was faster."""
    me = Holder.this(cluster)
    for i in range(ROUNDS):
        files = open_files(f"{root}/{i}")
        start.wait(PATIENCE_S)
        try:
            tenure = acquire(files, me, briefly)
            assert tenure is not None
            limit = time.monotonic() + PATIENCE_S
            while not end.n_waiting:
                assert time.monotonic() < limit, "the other one holds it, too"
                tenure.renew()
                briefly(LOOK_S)
            pipe.send(tenure.lease)
        except LeaseHeld as error:
            pipe.send(str(error))
        end.wait(PATIENCE_S)
