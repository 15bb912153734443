"""A link to a server that can be cut, stalled, or answer with errors."""

import re
import socket
import struct
import threading
from collections.abc import Callable
from contextlib import suppress

METHODS = (b"GET /", b"PUT /", b"POST /", b"HEAD /", b"DELETE /")
GO_ON = re.compile(rb"HTTP/1\.1 100 [^\r]*\r\n\r\n")
"""Asks for the rest of a request: the answer is still to come."""
RESET = struct.pack("ii", 1, 0)
ANSWER = (
    "HTTP/1.1 {status}\r\nContent-Type: application/xml\r\nContent-Length: {size}\r\nConnection: close\r\n\r\n{body}"
)


class Proxy:
    """Passes the bytes of each connection to a server on loopback and back, until it is told otherwise.

    Attributes:
        port: where it listens, also again after `mend`.
        requests: how many began that were passed on.
    """

    def __init__(self, server_port: int) -> None:
        self._server_port = server_port
        self._lock = threading.Lock()
        self._flowing = threading.Event()
        self._flowing.set()
        self._connections: list[socket.socket] = []
        self._errors: list[tuple[str, str]] = []
        self._cut_after: int | None = None
        self._replies_to_lose = 0
        self._refused: tuple[bytes, str, str] | None = None
        self._awaited: tuple[bytes, Callable[[], None]] | None = None
        self._listener = self._listen(0)
        self.port = self._listener.getsockname()[1]
        self.requests = 0

    # ------------------------------------------------------------ faults

    def cut(self) -> None:
        """Resets all connections, and refuses new ones, until `mend`."""
        with self._lock:
            _end(self._listener)
            for connection in self._connections:
                with suppress(OSError):
                    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
                _end(connection)
            self._connections.clear()

    def cut_after(self, upload_bytes: int) -> None:
        """Cuts when so many bytes more have been passed to the server."""
        self._cut_after = upload_bytes

    def mend(self) -> None:
        self._listener = self._listen(self.port)

    def stall(self) -> None:
        """Takes what comes, and passes nothing on, until `flow`."""
        self._flowing.clear()

    def flow(self) -> None:
        self._flowing.set()

    def fail(self, count: int, status: str, code: str) -> None:
        """Answers the next requests itself, with an error such as ("503 Slow Down", "SlowDown")."""
        with self._lock:
            self._errors += [(status, code)] * count

    def refuse(self, pattern: bytes, status: str, code: str) -> None:
        """Answers each request whose first line matches itself, with an error, until `heal`."""
        self._refused = pattern, status, code

    def lose_reply(self) -> None:
        """Breaks the connection in place of the next answer: the client cannot know what the server has done."""
        self._replies_to_lose = 1

    def before_put(self, name: bytes, call: Callable[[], None]) -> None:
        """Calls once, before the next PUT to a name with this in it is passed on."""
        self._awaited = name, call

    @property
    def refused(self) -> bool:
        """Whether some requests are."""
        return self._refused is not None

    @property
    def errors_left(self) -> int:
        return len(self._errors)

    def heal(self) -> None:
        """Whatever was wrong is so no longer."""
        self.flow()
        self._errors.clear()
        self._cut_after, self._replies_to_lose, self._awaited, self._refused = None, 0, None, None
        if self._listener.fileno() < 0:
            self.mend()

    def close(self) -> None:
        self.flow()
        self.cut()

    # ------------------------------------------------------------ traffic

    def _listen(self, port: int) -> socket.socket:
        listener = socket.create_server(("127.0.0.1", port))
        threading.Thread(target=self._accept, args=(listener,), daemon=True).start()
        return listener

    def _accept(self, listener: socket.socket) -> None:
        with suppress(OSError):  # closed
            while True:
                client, _ = listener.accept()
                threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        with self._lock:
            self._connections.append(client)
        server: socket.socket | None = None
        with suppress(OSError):
            while data := client.recv(1 << 16):
                self._flowing.wait()
                if data.startswith(METHODS):  # clients begin a request with a new write
                    if error := self._next_error(data.partition(b"\r\n")[0]):
                        _refuse(client, *error)
                        break
                    self.requests += 1
                    self._meet(data.partition(b"\r\n")[0])
                server = server or self._reach(client)
                server.sendall(data)
                self._count(len(data))
        _end(client, *([server] if server else []))

    def _reach(self, client: socket.socket) -> socket.socket:
        """Not before there is something to pass on: moto serves one connection at a time, and would wait for it."""
        server = socket.create_connection(("127.0.0.1", self._server_port))
        with self._lock:
            self._connections.append(server)
        threading.Thread(target=self._pass, args=(server, client), daemon=True).start()
        return server

    def _pass(self, server: socket.socket, client: socket.socket) -> None:
        with suppress(OSError):
            while data := server.recv(1 << 16):
                self._flowing.wait()
                if self._replies_to_lose and not GO_ON.fullmatch(data):
                    self._replies_to_lose -= 1
                    break
                client.sendall(data)
        _end(client, server)

    def _next_error(self, request: bytes) -> tuple[str, str] | None:
        if self._refused is not None and re.match(self._refused[0], request):
            return self._refused[1:]
        with self._lock:
            return self._errors.pop(0) if self._errors else None

    def _meet(self, request: bytes) -> None:
        if self._awaited is not None and request.startswith(b"PUT") and self._awaited[0] in request:
            _, call = self._awaited
            self._awaited = None
            call()

    def _count(self, size: int) -> None:
        if self._cut_after is None:
            return
        self._cut_after -= size
        if self._cut_after <= 0:
            self._cut_after = None
            self.cut()


def _refuse(client: socket.socket, status: str, code: str) -> None:
    body = f"<Error><Code>{code}</Code><Message>as asked for</Message></Error>"
    client.sendall(ANSWER.format(status=status, size=len(body), body=body).encode())
    client.shutdown(socket.SHUT_WR)
    while client.recv(1 << 16):  # or the rest of the request would reset the connection, and the answer with it
        pass


def _end(*sockets: socket.socket) -> None:
    """Wakes who waits on them, too, which closing alone does not."""
    for s in sockets:
        with suppress(OSError):
            s.shutdown(socket.SHUT_RDWR)
        s.close()
