"""The bytes of a file, or of all files of a directory one after the other in order of their paths."""

import os
import sys
import sysconfig
import weakref
from contextlib import suppress
from hashlib import blake2b
from pathlib import Path
from tempfile import NamedTemporaryFile

import numpy as np
import numpy.typing as npt

from evenkeel.config_schema import STDLIB
from evenkeel.config_values import ConfigError, hide_in_url

Bytes = npt.NDArray[np.uint8]

_FOREIGN = {"site-packages", "dist-packages"}
"""Directories within the standard library's that hold what was installed beside it."""


class Corpus:
    """A text, mapped into memory where it is one file. What somebody else writes to that appears in the mapping.

    Args:
        file: a descriptor of the mapped file, which is closed with the corpus.
        name: of the file, for messages.

    Attributes:
        text: all of it. Reading from it where the file has been cut off kills the process.
    """

    def __init__(self, text: Bytes, file: int | None = None, name: str = "") -> None:
        self.text = text
        self._file, self._name = file, name
        self._written = self._state()
        if file is not None:
            weakref.finalize(self, os.close, file)

    def check(self) -> None:
        """Raises ValueError if the file was written to since it was opened; takes a microsecond."""
        if self._state() != self._written:
            raise ValueError(f"{self._name} was written to while it is in use; put it back and submit the run again")

    def _state(self) -> tuple[int, int]:
        if self._file is None:
            return 0, 0
        status = os.fstat(self._file)
        return status.st_size, status.st_mtime_ns


def read_corpus(path: str, suffix: str | None, key: str) -> Corpus:
    """The text of a file or a directory.

    Many small files are read once and kept as one file in the user's cache directory, under a name made of their
    paths, sizes and times; starting workers then take milliseconds. Any number of processes may do so at once.

    Args:
        path: of a file or directory, or "stdlib".
        suffix: of the files of a directory that count; None: all.
        key: of the configuration, for messages.

    Raises:
        ConfigError: if there is nothing there, or nothing in it, or it cannot be read.
    """
    try:
        if path == STDLIB:
            corpus = _read_stdlib(key)
        elif Path(path).is_dir():
            files = _list_files(Path(path), suffix)
            if not files:
                raise ConfigError(f"directory {path} has no files{f' that end in {suffix}' if suffix else ''}", key)
            corpus = _read_cached(Path(path), files)
        else:
            corpus = _map(Path(path), key)
    except FileNotFoundError as error:
        # Of a URL the error has lost a "/", and credentials in it would no longer be seen.
        missing = hide_in_url(path) if "://" in path else error.filename or path
        raise ConfigError(f"there is no file or directory {missing}", key) from error
    except OSError as error:
        raise ConfigError(f"cannot read {error.filename or path}: {error.strerror}", key) from error
    if len(corpus.text) == 0:
        raise ConfigError(f"{path} is empty", key)
    return corpus


def _read_stdlib(key: str) -> Corpus:
    """Sources of the standard library, without what a build writes into it, which differs between machines."""
    root = Path(sysconfig.get_path("stdlib"))
    files = [file for file in _list_files(root, ".py") if not file[0].startswith("_sysconfigdata")]
    if not files:
        version = ".".join(str(n) for n in sys.version_info[:3])
        raise ConfigError(f"Python {version} at {root} comes without the sources of its standard library", key)
    return _read_cached(root, files)


def _list_files(root: Path, suffix: str | None) -> list[tuple[str, int, int]]:
    """(path relative to root, bytes, time in ns) of each file, sorted by the path's parts; hidden ones do not count."""
    found: list[tuple[tuple[str, ...], int, int]] = []
    for folder, folders, files in os.walk(root):
        folders[:] = [name for name in folders if not name.startswith(".") and name not in _FOREIGN]
        for name in files:
            if not name.startswith(".") and (suffix is None or name.endswith(suffix)):
                path = Path(folder, name)
                status = path.stat()
                found.append((path.relative_to(root).parts, status.st_size, status.st_mtime_ns))
    return [("/".join(parts), size, time) for parts, size, time in sorted(found)]


def _read_cached(root: Path, files: list[tuple[str, int, int]]) -> Corpus:
    size = sum(size for _, size, _ in files)
    name = blake2b(repr((str(root.resolve()), files)).encode(), digest_size=16).hexdigest()
    cached = _cache_directory() / f"corpus-{name}.bytes"
    with suppress(OSError):
        if cached.stat().st_size == size:
            return _map(cached, "the cache")
    text = b"".join((root / path).read_bytes() for path, _, _ in files)
    with suppress(OSError):  # without a cache it only takes longer
        _write_whole(cached, text)
    return Corpus(np.frombuffer(text, dtype=np.uint8))


def _write_whole(path: Path, content: bytes) -> None:
    """The file appears complete or not at all, also when several processes write it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with NamedTemporaryFile(dir=path.parent, prefix=path.name, delete=False) as file:
        try:
            file.write(content)
            file.close()
            os.replace(file.name, path)
        except BaseException:
            os.unlink(file.name)
            raise


def _cache_directory() -> Path:
    """As the XDG base directory specification has it."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "evenkeel")


def _map(path: Path, key: str) -> Corpus:
    if path.stat().st_size == 0:
        return Corpus(np.empty(0, dtype=np.uint8))
    with path.open("rb") as file:
        return Corpus(np.memmap(file, dtype=np.uint8, mode="r"), os.dup(file.fileno()), f"{key}: {path}")
