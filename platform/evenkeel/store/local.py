"""What files on a local (or mounted) file system need beyond reading and writing: to be durable, with no long wait at
their end, and to be replaced by one at a time."""

import ctypes
import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
WINDOW_BYTES = 64 << 20
"""Of a stream, sent to the disk at a time: enough to use the disk well, so few that waiting for them is short."""
_BEGIN, _FINISH = 2, 7
"""Flags of sync_file_range: write what is dirty; and wait for what is under way, write the rest, wait for that."""


def write_durably(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Makes a name in the folder survive a crash of the machine."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Keeps all others out who lock the file, until the block ends; within it the file may be replaced.

    The lock is on the file itself: whoever gets it looks whether the file is still the one of that name, and a process
    that dies leaves none behind. Where the file system knows no locks nobody is kept out.

    Raises:
        FileNotFoundError: there is no such file.
    """
    while True:
        with path.open("r+b") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX)
            except OSError as error:
                if error.errno not in _NO_LOCKS:
                    raise
            if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                yield
                return


class Streamed:
    """A new file, written from its first byte to its last, whose bytes go to the disk while more of them come.

    Else they would stay in memory until the sync at the end, for which a slow disk takes minutes without any sign of
    progress. Here that has about two windows left to do: each is begun as soon as it is full, and waited for when the
    next one is. A file smaller than a window is written as any other.
    """

    def __init__(self, path: Path) -> None:
        self._file = path.open("wb")
        self._size = self._begun = self._done = 0

    def write(self, data: bytes | memoryview) -> None:
        """Returns when no more than two windows are still to go to the disk. Raises OSError."""
        self._size += self._file.write(data)
        if self._size >= self._begun + WINDOW_BYTES:
            self._send(self._size - self._size % WINDOW_BYTES)

    def _send(self, stop: int) -> None:
        self._file.flush()
        fd = self._file.fileno()
        if _sync_range(fd, self._begun, stop, _BEGIN):
            # It cannot be told to begin: not on this system or file system; or that has failed, which this tells, too.
            os.fdatasync(fd)
            self._done = stop
        elif self._done < self._begun:
            if failed := _sync_range(fd, self._done, self._begun, _FINISH):
                raise OSError(failed, os.strerror(failed))  # told only once: the sync at the end would not know of it
            self._done = self._begun
        self._begun = stop

    def sync(self) -> None:
        """Returns when all of it is durable, but for its name. Raises OSError."""
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """What it still holds was either flushed, or could not be written, which is told by then."""
        with suppress(OSError):
            self._file.close()


def _sync_range(fd: int, start: int, stop: int, flags: int) -> int:
    """sync_file_range of Linux, which the module os lacks. Returns 0, or the errno."""
    call = getattr(ctypes.CDLL(None, use_errno=True), "sync_file_range", None)
    if call is None:
        return errno.ENOSYS
    call.argtypes = [ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint]
    return ctypes.get_errno() if call(fd, start, stop - start, flags) else 0
