"""Where workers find each other: each has one listening socket from its start, and others connect to it.

A connection begins with a hello that names its generation, its purpose (a label) and the sender's rank; the
worker that it is meant for claims it when it forms that generation, which may be later. So a generation meets
without a round trip to anybody, and there is no store that could outlive or outrank the workers.

Why not torch's TCPStore: connecting to it looks names up in reverse (measured: 5 s whenever a DNS answer is
lost, torch 2.13), it retries against a dead host, and a wait in it cannot be broken.
"""

import selectors
import socket
import struct
import threading
from dataclasses import dataclass

from evenkeel.core.ids import Generation

_HELLO = struct.Struct("<4sQIH")  # magic, generation, sender's rank, bytes of the label that follows
_MAGIC = b"evk1"


class GroupBroken(RuntimeError):  # noqa: N818
    """A connection to a member failed: it died, it broke its groups, or it is in another place of the program."""


class GroupAborted(GroupBroken):
    """The generation was aborted by this worker while, or before, something of it ran."""


@dataclass(frozen=True, slots=True)
class Purpose:
    """What a connection is for. `label` is the same at both ends; `rank` is of the worker that connects."""

    generation: Generation
    label: str
    rank: int

    def encode(self) -> bytes:
        label = self.label.encode()
        return _HELLO.pack(_MAGIC, self.generation, self.rank, len(label)) + label


class StoreServer:
    """A worker's listening socket, and the connections that nobody has claimed yet.

    A generation that was forgotten stays so: whoever connects for it later is refused (design, rule 14).

    Raises:
        OSError: if `host` is not an address of this machine.
    """

    def __init__(self, host: str = "127.0.0.1") -> None:
        family = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)[0][0]
        self._listener = socket.create_server((host, 0), family=family, backlog=1024)
        self._listener.setblocking(False)
        self.host = host
        self.port: int = self._listener.getsockname()[1]
        self._changed = threading.Condition()
        self._waiting: dict[Purpose, socket.socket] = {}
        self._floor: Generation = -1
        self._wake_read, self._wake_write = socket.socketpair()
        self._thread = threading.Thread(target=self._serve, name="evenkeel-rendezvous", daemon=True)
        self._thread.start()

    def claim(self, purpose: Purpose) -> socket.socket:
        """The connection with this purpose, as soon as it is there; it is the caller's from now on.

        Raises:
            GroupAborted: when the generation is, or becomes, forgotten.
        """
        with self._changed:
            self._changed.wait_for(lambda: purpose in self._waiting or purpose.generation <= self._floor)
            if purpose.generation <= self._floor:
                raise GroupAborted(f"generation {purpose.generation} was aborted before {purpose.label} was connected")
            return self._waiting.pop(purpose)

    def forget(self, generation: Generation) -> None:
        """Refuse everything of this generation and of those before it, and free who waits for it."""
        with self._changed:
            self._floor = max(self._floor, generation)
            for purpose in [p for p in self._waiting if p.generation <= generation]:
                self._waiting.pop(purpose).close()
            self._changed.notify_all()

    def close(self) -> None:
        self._wake_write.close()
        self._thread.join()
        self.forget(2**63)

    def _serve(self) -> None:
        """Accepts and reads hellos, never waiting for one peer: it may be stopped in the middle of its hello."""
        hellos: dict[socket.socket, bytearray] = {}
        with selectors.DefaultSelector() as selector, self._listener, self._wake_read:
            selector.register(self._listener, selectors.EVENT_READ)
            selector.register(self._wake_read, selectors.EVENT_READ)
            while True:
                ready = [key.fileobj for key, _ in selector.select()]
                if self._wake_read in ready:
                    break
                for sock in [s for s in hellos if s in ready]:
                    if self._read(sock, hellos[sock]):
                        selector.unregister(sock)
                        del hellos[sock]
                if self._listener in ready:
                    accepted = self._accept()
                    if accepted is not None:
                        selector.register(accepted, selectors.EVENT_READ)
                        hellos[accepted] = bytearray()
        for sock in hellos:
            sock.close()

    def _accept(self) -> socket.socket | None:
        try:
            sock, _ = self._listener.accept()
        except OSError:  # the peer is gone again, or this process is out of file descriptors for now
            return None
        sock.setblocking(False)
        return sock

    def _read(self, sock: socket.socket, hello: bytearray) -> bool:
        """Reads what is there of the hello; whether the connection was handed on or dropped."""
        want = _HELLO.size if len(hello) < _HELLO.size else _HELLO.size + _HELLO.unpack_from(hello)[3]
        try:
            more = sock.recv(want - len(hello))  # never a byte beyond the hello: the rest is the claimer's
        except BlockingIOError:
            return False
        except OSError:
            more = b""
        hello += more
        if not more or not hello.startswith(_MAGIC[: len(hello)]):
            sock.close()
            return True
        if len(hello) < _HELLO.size:
            return False
        _, generation, rank, length = _HELLO.unpack_from(hello)
        if len(hello) < _HELLO.size + length:
            return False
        self._offer(Purpose(generation, hello[_HELLO.size :].decode(errors="replace"), rank), sock)
        return True

    def _offer(self, purpose: Purpose, sock: socket.socket) -> None:
        with self._changed:
            if purpose.generation <= self._floor:
                sock.close()
                return
            old = self._waiting.pop(purpose, None)
            if old is not None:
                old.close()
            self._waiting[purpose] = sock
            self._changed.notify_all()
