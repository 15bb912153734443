"""What files on a local (or mounted) file system need beyond reading and writing: to be durable, and to be replaced
by one at a time."""

import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


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


def close(file: BinaryIO) -> None:
    """What it still holds was either flushed, or could not be written, which is told by then."""
    with suppress(OSError):
        file.close()
