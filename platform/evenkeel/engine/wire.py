"""Messages over connected, non-blocking TCP sockets. Every wait in here ends at once when the socket is shut down.

Why not gloo: what it has written or read in part it forgets when a connection breaks, and whoever waits for it
hangs until the timeout (measured on torch 2.13: 2 of 50 all-reduces of 4 MB, 11 of 75 of 13 MB, 5 of 25 broadcasts
of 4 MB, 10 of 11 sends of 64 MB). Unequal sizes kill its process. For small messages it was 7 to 25 times slower.

A message is a header (its number on this connection in this direction, and its bytes) and the bytes.
"""

import select
import socket
import struct
import threading
import time
from collections import deque
from collections.abc import Mapping

from evenkeel.engine.rendezvous import GroupBroken

_HEADER = struct.Struct("<QQ")
_Buffers = list[memoryview]

LARGE_BYTES = 64 * 1024
"""Of smaller messages, and of what of larger ones is there at once, the time says nothing of the link."""

KEPT = 64
"""The newest large messages of a connection of which it is known how they came in."""

KEEPALIVE_S = 60
"""A connection that carries nothing for so long is probed: firewalls drop what is idle, the shortest after minutes, and
a mirror comes every so many steps. How many probes may go unanswered is left to the system: 9, 75 s apart, on Linux."""


class Connection:
    """One end of a connection to `peer`, a name for messages to people. Not safe for two senders or two receivers."""

    def __init__(self, sock: socket.socket, peer: str) -> None:
        self.sock = sock
        self.peer = peer
        self._sent = 0
        self._received = 0
        self._came: deque[tuple[int, float]] = deque(maxlen=KEPT)
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, KEEPALIVE_S)

    def outgoing(self, payload: memoryview) -> _Buffers:
        """The next message to send, as what is left to write."""
        self._sent += 1
        header = memoryview(_HEADER.pack(self._sent, payload.nbytes))
        return [header, payload] if payload.nbytes else [header]

    def incoming(self, payload: memoryview) -> "Incoming":
        """The next message to receive, into `payload`, which must be just as long."""
        self._received += 1
        return Incoming(self, self._received, payload)

    def came(self, count: int, seconds: float) -> None:
        """So many bytes of a large message came in in so long; 0 in no time if it was there at once."""
        self._came.append((count, seconds))

    def received(self) -> list[tuple[int, float]]:
        """Of each large message that came in since this was asked last: how many bytes were not there when the first
        ones were, and the seconds until they were. Of the KEPT newest; 0 and 0 of one that was there at once."""
        found = list(self._came)
        self._came.clear()
        return found

    def push(self, left: _Buffers) -> None:
        """Writes what can be written now. Raises GroupBroken."""
        try:
            while left:
                _advance(left, self.sock.sendmsg(left))
        except BlockingIOError:
            pass
        except OSError as error:
            raise GroupBroken(f"{self.peer} does not receive any more: {error}") from error


class Incoming:
    """A message that is being received."""

    def __init__(self, connection: Connection, number: int, payload: memoryview) -> None:
        self._connection = connection
        self._header = memoryview(bytearray(_HEADER.size))
        self._expected = (number, payload.nbytes)
        self._checked = False
        self._rest: tuple[int, float] | None = None
        self.left: _Buffers = [self._header, payload] if payload.nbytes else [self._header]

    def pull(self) -> None:
        """Reads what is there. Raises GroupBroken: also at the end of the stream, and for an unexpected message."""
        try:
            while self.left:
                count = self._connection.sock.recvmsg_into(self.left)[0]
                if not count:
                    raise GroupBroken(f"{self._connection.peer} closed the connection")
                _advance(self.left, count)
                if not self._checked:
                    self._check()
        except BlockingIOError:
            if self._checked and self._rest is None:
                self._rest = sum(buffer.nbytes for buffer in self.left), time.perf_counter()
        except OSError as error:
            raise GroupBroken(f"{self._connection.peer} does not send any more: {error}") from error
        if not self.left and self._expected[1] >= LARGE_BYTES:
            count, since = self._rest or (0, 0.0)
            if count >= LARGE_BYTES:
                self._connection.came(count, time.perf_counter() - since)
            else:
                self._connection.came(0, 0.0)

    def _check(self) -> None:
        """Before the bytes are waited for: a message that is too short would be waited for without end."""
        if self.left and self.left[0].obj is self._header.obj:
            return
        self._checked = True
        found = _HEADER.unpack(self._header)
        if found != self._expected:
            raise GroupBroken(
                f"{self._connection.peer} sent {found[1]} bytes as message {found[0]}; here {self._expected[1]} bytes "
                f"were expected as message {self._expected[0]}: the two run different code or different layouts"
            )


def exchange(outgoing: Mapping[Connection, memoryview], incoming: Mapping[Connection, memoryview]) -> None:
    """Sends one message to each and receives one from each, all at the same time.

    Raises:
        GroupBroken: if a connection fails; the contents of `incoming` are undefined then.
    """
    sends = {connection.sock.fileno(): (connection, connection.outgoing(data)) for connection, data in outgoing.items()}
    receives = {connection.sock.fileno(): connection.incoming(data) for connection, data in incoming.items()}
    for connection, left in sends.values():
        connection.push(left)
    sends = {fd: send for fd, send in sends.items() if send[1]}
    poll = select.poll()
    for fd in sends.keys() | receives.keys():
        poll.register(fd, _events(fd in sends, fd in receives))
    while sends or receives:
        for fd, event in poll.poll():
            if fd in receives and event & ~select.POLLOUT:
                receives[fd].pull()
            if fd in sends and event & ~select.POLLIN:
                sends[fd][0].push(sends[fd][1])
            # Whatever is not finished stays registered; a level-triggered poll reports it again.
            finished = (fd in sends and not sends[fd][1]) + (fd in receives and not receives[fd].left)
            if finished:
                _finish(fd, sends, receives, poll)


def _finish(
    fd: int, sends: dict[int, tuple[Connection, _Buffers]], receives: dict[int, Incoming], poll: select.poll
) -> None:
    if fd in sends and not sends[fd][1]:
        del sends[fd]
    if fd in receives and not receives[fd].left:
        del receives[fd]
    if fd in sends or fd in receives:
        poll.modify(fd, _events(fd in sends, fd in receives))
    else:
        poll.unregister(fd)


def _events(sending: bool, receiving: bool) -> int:
    return (select.POLLOUT if sending else 0) | (select.POLLIN if receiving else 0)


def _advance(left: _Buffers, count: int) -> None:
    while left and count >= left[0].nbytes:
        count -= left.pop(0).nbytes
    if count:
        left[0] = left[0][count:]


def receive(connection: Connection, payload: memoryview) -> None:
    """Blocks until the next message has filled `payload`. Raises GroupBroken."""
    exchange({}, {connection: payload})


class Outbox:
    """Sends without waiting: what the socket does not take at once is copied, and written by a passing thread.

    So two neighbours that send to each other first and receive afterwards cannot block one another.
    """

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._lock = threading.Lock()
        self._left: deque[_Buffers] = deque()
        self._thread: threading.Thread | None = None
        self._error: GroupBroken | None = None

    def send(self, payload: memoryview) -> None:
        """When it returns, `payload` may be overwritten. Raises GroupBroken, also for an earlier message's sake."""
        with self._lock:
            if self._error is not None:
                raise self._error
            message = self._connection.outgoing(payload)
            if not self._left:
                self._connection.push(message)
            if not message:
                return
            self._left.append([memoryview(bytes(buffer)) for buffer in message])
            if len(self._left) == 1:
                self._thread = threading.Thread(target=self._write, name="evenkeel-outbox", daemon=True)
                self._thread.start()

    def drain(self) -> None:
        """Blocks until everything is written. Raises GroupBroken."""
        self.flush()
        if self._error is not None:
            raise self._error

    def flush(self) -> None:
        """Blocks until everything is written, or the connection is broken."""
        thread = self._thread
        if thread is not None:
            thread.join()

    def _write(self) -> None:
        poll = select.poll()
        poll.register(self._connection.sock.fileno(), select.POLLOUT)
        while True:
            poll.poll()
            with self._lock:
                try:
                    self._connection.push(self._left[0])
                except GroupBroken as error:
                    self._error = error
                    self._left.clear()
                    return
                if not self._left[0]:
                    self._left.popleft()
                if not self._left:
                    return
