"""What a worker makes of what it measures: passes by their work, and links by most of their messages."""

import socket
import time
from contextlib import suppress
from typing import cast

import pytest
import torch

from evenkeel.core.ids import WorkerId
from evenkeel.engine.groups import GroupSet, Received
from evenkeel.engine.meter import Meter
from evenkeel.engine.wire import KEPT, LARGE_BYTES, Connection

ME, BEFORE, AFTER = WorkerId("w1"), WorkerId("w0"), WorkerId("w2")


class Came:
    """What a GroupSet says of the messages that came in."""

    def __init__(self, *told: Received) -> None:
        self._told = told

    def received(self) -> tuple[Received, ...]:
        told, self._told = self._told, ()
        return told


def meter(*told: Received) -> Meter:
    return Meter(ME, (0, 2), True, torch.device("cpu"), cast(GroupSet, Came(*told)))


def computed(seconds: float) -> None:
    """In this thread's processor time, as the meter counts it."""
    until = time.thread_time() + seconds
    while time.thread_time() < until:
        pass


def micro_batches(measuring: Meter, works: list[float], detailed: bool = False) -> None:
    """Passes of 1F1B in a first stage of two: each backward pass is of the micro-batch before the newest.

    Of a usual micro-batch the forward pass takes 2 ms and the backward pass 4, a third of each in layer 0.
    """
    measuring.begin(on=True, detailed=detailed)

    def passes(work: float, each: float, order: tuple[int, ...]) -> None:
        for layer in order:
            measuring.at(layer)
            computed(work * each * (1 + layer))
        measuring.at(-1)

    for before, work in zip([None, *works], [*works, None], strict=True):
        if work is not None:
            measuring.work = work
            mark = measuring.now()
            passes(work, 0.002 / 3, (0, 1))
            measuring.forward(mark)
        if before is not None:
            mark = measuring.now()
            passes(before, 0.004 / 3, (1, 0))
            measuring.backward(mark)
    measuring.end()


@pytest.mark.parametrize("works", [[1.0] * 5, [0.5, 3.0, 1.0, 4.0, 0.7], [4.0] * 3])
def test_a_pass_counts_by_its_work(works: list[float]) -> None:
    measuring = meter()
    micro_batches(measuring, works, detailed=True)
    told = measuring.timing()
    assert told.pass_s == pytest.approx(0.006, rel=0.1)
    assert told.layers == pytest.approx((0.002, 0.004), rel=0.1)
    assert measuring.timing().pass_s == 0.0  # it was told


def test_what_is_no_training_step_does_not_count() -> None:
    measuring = meter()
    mark = measuring.now()
    measuring.forward(mark)
    measuring.at(0)
    assert (measuring.timing().pass_s, measuring.timing().layers) == (0.0, ())


def test_single_late_messages_make_no_slow_link() -> None:
    """At 1 GB/s, but for three or four of ten a process waited for its core. The mean is 70 times that."""
    prompt, late = (1_000_000, 0.001), (1_000_000, 0.1)
    activations = [prompt] * 6 + [late] * 4
    gradients = [(0, 0.0)] * 6 + [late] * 3 + [prompt]  # most of them were there at once
    sums = [(8_000_000, 0.004)] * 3
    told = meter((BEFORE, activations, True), (AFTER, gradients, True), (AFTER, sums, False)).timing()
    assert told.receive_s == pytest.approx(0.001)
    assert (told.source, told.bytes_per_s) == (BEFORE, pytest.approx(1e9))


def test_a_slow_link_shows_in_all_messages() -> None:
    slow = [(1_000_000, 0.1)] * 6 + [(0, 0.0)] * 4
    told = meter((BEFORE, slow, True), (AFTER, [(1_000_000, 0.001)] * 10, True)).timing()
    assert told.receive_s == pytest.approx(0.101)
    assert (told.source, told.bytes_per_s) == (BEFORE, pytest.approx(1e7))


def test_how_a_message_came_in() -> None:
    """Of one that was there at once nothing is measured, of another what came after its first bytes; no small ones."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        theirs = Connection(socket.create_connection(server.getsockname()), "we")
        ours = Connection(server.accept()[0], "they")
    header, size = 16, 3 * LARGE_BYTES
    with theirs.sock, ours.sock:
        for payload, first in ((LARGE_BYTES, LARGE_BYTES), (LARGE_BYTES - 1, 100), (size, LARGE_BYTES)):
            receiving = ours.incoming(memoryview(bytearray(payload)))
            left = memoryview(b"".join(theirs.outgoing(memoryview(bytes(payload)))))
            theirs.push([left[: header + first]])
            while peeked(ours, header + first) < header + first:
                pass
            receiving.pull()
            rest = [left[header + first :]]
            while receiving.left:
                theirs.push(rest)
                receiving.pull()
        at_once, in_parts = ours.received()
    assert at_once == (0, 0.0)
    assert in_parts[0] == size - LARGE_BYTES
    assert in_parts[1] > 0
    assert ours.received() == []
    for count in range(KEPT + 5):
        ours.came(count, 1.0)
    assert [count for count, _ in ours.received()] == list(range(5, KEPT + 5))


def peeked(connection: Connection, count: int) -> int:
    """So many of the bytes have come."""
    with suppress(BlockingIOError):
        return len(connection.sock.recv(count, socket.MSG_PEEK))
    return 0
