"""The connections of one worker in one generation, and the one switch that breaks them all."""

import contextlib
import errno
import os
import select
import socket
import threading
from typing import Any

from evenkeel.core.ids import Generation
from evenkeel.core.layout import WorkerInfo
from evenkeel.engine.rendezvous import GroupAborted, GroupBroken, Purpose, StoreServer
from evenkeel.engine.wire import Connection


class Mesh:
    """Makes connections to other workers; `abort` breaks those that there are and those that are being made."""

    def __init__(self, generation: Generation, server: StoreServer) -> None:
        self._generation = generation
        self._server = server
        self._lock = threading.Lock()
        self._sockets: list[socket.socket] = []
        self._aborted = False

    @property
    def aborted(self) -> bool:
        """Set before anything is broken, so that whoever finds a connection broken knows why (design, rule 2)."""
        return self._aborted

    def abort(self) -> None:
        """Every operation that is blocked, or will be tried, raises GroupAborted. Idempotent, never blocks."""
        self._aborted = True
        self._server.forget(self._generation)
        self.cut()

    def cut(self) -> None:
        """Shuts the connections down, not as an abort: the others learn of what went wrong here."""
        with self._lock:
            for sock in self._sockets:
                with contextlib.suppress(OSError):  # not connected yet, or not any more
                    sock.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Only when nobody uses the connections any more."""
        with self._lock:
            while self._sockets:
                self._sockets.pop().close()

    def claim(self, label: str, peer_rank: int, peer: WorkerInfo) -> Connection:
        """The connection that the peer makes for `label`; blocks until it does. Raises GroupAborted."""
        sock = self._server.claim(Purpose(self._generation, label, peer_rank))
        self._own(sock)
        return Connection(sock, _name(peer_rank, peer))

    def call(self, label: str, rank: int, peer_rank: int, peer: WorkerInfo) -> Connection:
        """Makes the connection that the peer claims; does not wait for that, only for its process's socket to answer.

        Raises:
            GroupAborted: once `abort` is called.
            GroupBroken: if the peer cannot be reached.
        """
        purpose, name = Purpose(self._generation, label, rank), _name(peer_rank, peer)
        try:
            family, kind, _, _, address = socket.getaddrinfo(peer.store_host, peer.store_port, type=socket.SOCK_STREAM)[
                0
            ]
            sock = socket.socket(family, kind)
            self._own(sock)
            self._reach(sock, address)
            sock.sendall(purpose.encode())  # a few bytes into an empty buffer
        except OSError as error:
            if self._aborted:
                raise GroupAborted(f"generation {purpose.generation} was aborted") from error
            raise GroupBroken(f"{name} cannot be reached at {peer.store_host}:{peer.store_port}: {error}") from error
        return Connection(sock, name)

    def _reach(self, sock: socket.socket, address: Any) -> None:
        """Like sock.connect(address), but an abort ends it at any time. Raises OSError."""
        sock.setblocking(False)
        error = sock.connect_ex(address)
        if error == errno.EINPROGRESS:
            # A shutdown before the call left no trace, so the flag is read after it; one from now on ends the poll.
            if self._aborted:
                raise OSError(errno.ECANCELED, "aborted")
            poll = select.poll()
            poll.register(sock.fileno(), select.POLLOUT)
            poll.poll()
            error = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if error:
            raise OSError(error, os.strerror(error))

    def _own(self, sock: socket.socket) -> None:
        with self._lock:
            if self._aborted:
                sock.close()
                raise GroupAborted(f"generation {self._generation} was aborted")
            self._sockets.append(sock)


def _name(rank: int, info: WorkerInfo) -> str:
    return f"worker {info.worker_id} (rank {rank})"
