"""Whole files under one root, on a local path or an object store: the few operations that a run directory needs."""

import errno
import os
import shutil
import uuid
from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from fsspec.config import conf
from fsspec.implementations.local import LocalFileSystem
from fsspec.spec import AbstractBufferedFile, AbstractFileSystem

from evenkeel.store.errors import StoreError
from evenkeel.store.failures import (
    explain,
    full,
    past_the_end,
    reveals,
    said_of,
    secrets_in,
    transient,
    without_credentials,
)
from evenkeel.store.local import Streamed, locked, sync_folder, write_durably
from evenkeel.store.objects import abort_uploads, creates_atomically, if_there, replace_tagged, tag_of
from evenkeel.store.options import open_file_system
from evenkeel.store.upload import open_upload

TEMPORARY = ".tmp-"
"""Part of the names of files that are not whole yet; these are never listed."""


class Sink(Protocol):
    """A file being written."""

    def write(self, data: bytes | memoryview) -> None:
        """Appends it; what is given must stay as it is until the file is whole, for it may be sent later, from there.

        Raises:
            StoreError: the store fails.
        """


class Files(Protocol):
    """Names are relative to the root and use "/"; every method raises StoreError where the store fails."""

    def where(self, name: str = "") -> str:
        """Path or URL of a file, or of the root."""

    def read(self, name: str, offset: int = 0) -> bytes | None:
        """The bytes from `offset` on; None if there is no such file."""

    def read_into(self, name: str, offset: int, buffer: memoryview) -> int | None:
        """Fills `buffer` (of bytes) from `offset` on; how many came, fewer where the file ends. None: no such file."""

    def replace(self, name: str, data: bytes) -> None:
        """Writes the whole file; a reader sees the old one or the new one."""

    def create(self, name: str, data: bytes) -> bool:
        """Writes the whole file durably if there is none, else answers False. Never visible half-written.

        `data` must be unlike what any other writer would write (hold a nonce): where a store answers unclearly the
        file is read back, and equal bytes count as one's own success.
        """

    def replace_if(self, name: str, data: bytes, gives_way: Callable[[], bool]) -> bool:
        """Writes the whole file if what is there gives way, which is asked just before; else answers False.

        It is asked again when somebody was quicker, or seems to have been: with a lost reply, it is shown one's own.

        On a local path nobody replaces it so meanwhile, and on S3 nobody at all if the server knows If-Match, as Ceph's
        does. On other stores another may, in the time between a look and the request that follows it.
        """

    def remove(self, name: str) -> None:
        """Removes a file that may be gone already."""

    def names(self, folder: str) -> list[str]:
        """Names of the files in a folder, sorted; none if there is no such folder."""

    def sizes(self, folder: str) -> dict[str, int]:
        """Bytes of each of `names(folder)`."""

    def folders(self, folder: str) -> list[str]:
        """Names of the folders in a folder, sorted; on an object store those that hold a file."""

    def remove_folder(self, folder: str) -> None:
        """Removes a folder, that may be gone already, with all in it; on a local path unfinished files too."""

    def drop_unfinished(self, folder: str, which: Callable[[str], bool] = bool) -> int:
        """Removes what killed writers left of files in a folder and below it, which no listing shows; of how many.

        Nobody may be writing one of these: it would be taken for such a one.

        Args:
            which: whether a file is meant, by its name relative to the folder; as it is here, all are.
        """

    def stream(self, name: str) -> AbstractContextManager[Sink]:
        """A file to write piece by piece, that appears whole when the block ends, and not at all if it raises."""


def open_files(url: str, options: dict[str, Any] | None = None) -> Files:
    """The root `url`: a local path, or an fsspec URL, whose file system gets `options`.

    Raises:
        StoreError: if no file system of that name is installed, or its options are wrong.
    """
    secrets = secrets_in([options, conf, said_of(url)])
    with _told(without_credentials(url), (ImportError, ValueError, TypeError, OSError), secrets):
        fs, path = open_file_system(url, options)
    return LocalFiles(Path(path)) if isinstance(fs, LocalFileSystem) else ObjectFiles(fs, path, url, secrets)


class LocalFiles:
    """Files on a local (or mounted) file system, which must know hard links for `create`."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def where(self, name: str = "") -> str:
        return str(self.path(name))

    def path(self, name: str) -> Path:
        return self.root / name if name else self.root

    def read(self, name: str, offset: int = 0) -> bytes | None:
        with _told(self.where(name), OSError):
            try:
                with self.path(name).open("rb") as file:
                    file.seek(offset)
                    return file.read()
            except FileNotFoundError:
                return None

    def read_into(self, name: str, offset: int, buffer: memoryview) -> int | None:
        with _told(self.where(name), OSError):
            try:
                with self.path(name).open("rb") as file:
                    file.seek(offset)
                    return file.readinto(buffer)
            except FileNotFoundError:
                return None

    def replace(self, name: str, data: bytes) -> None:
        with self.stream(name) as file:
            file.write(data)

    def create(self, name: str, data: bytes) -> bool:
        with _told(self.where(name), OSError), self._temporary(name) as temporary:
            write_durably(temporary, data)
            try:
                os.link(temporary, self.path(name))
            except FileExistsError:
                # NFS may repeat a link that succeeded, and then it finds its own.
                return self.read(name) == data
            except OSError as error:
                if error.errno in (errno.EPERM, errno.ENOTSUP, errno.ENOSYS):
                    problem = "the file system has no hard links, which a run needs"
                    raise StoreError(f"{self.where(name)}: {problem}") from error
                raise
            sync_folder(self.path(name).parent)
            return True

    def replace_if(self, name: str, data: bytes, gives_way: Callable[[], bool]) -> bool:
        while True:
            with _told(self.where(name), OSError), suppress(FileNotFoundError), locked(self.path(name)):
                if gives_way():
                    self.replace(name, data)
                    return True
                return False
            if self.create(name, data):  # it was removed
                return True

    def remove(self, name: str) -> None:
        with _told(self.where(name), OSError):
            self.path(name).unlink(missing_ok=True)

    def names(self, folder: str) -> list[str]:
        return sorted(e.name for e in self._entries(folder) if e.is_file() and TEMPORARY not in e.name)

    def sizes(self, folder: str) -> dict[str, int]:
        sizes: dict[str, int] = {}
        for name in self.names(folder):
            path = self.path(folder) / name
            with _told(str(path), OSError), suppress(FileNotFoundError):
                sizes[name] = path.stat().st_size
        return sizes

    def folders(self, folder: str) -> list[str]:
        return sorted(e.name for e in self._entries(folder) if e.is_dir())

    def remove_folder(self, folder: str) -> None:
        with _told(self.where(folder), OSError), suppress(FileNotFoundError):
            shutil.rmtree(self.path(folder))

    def drop_unfinished(self, folder: str, which: Callable[[str], bool] = bool) -> int:
        found = 0
        with _told(self.where(folder), OSError):
            for path in self.path(folder).rglob(f".*{TEMPORARY}*"):
                target = path.with_name(path.name[1:].rpartition(TEMPORARY)[0])
                if which(target.relative_to(self.path(folder)).as_posix()):
                    path.unlink(missing_ok=True)
                    found += 1
        return found

    def _entries(self, folder: str) -> list[os.DirEntry[str]]:
        with _told(self.where(folder), OSError):
            try:
                return list(os.scandir(self.path(folder)))
            except FileNotFoundError:
                return []

    @contextmanager
    def stream(self, name: str) -> Iterator[Sink]:
        told = partial(_told, self.where(name), OSError)
        with ExitStack() as stack:
            with told():
                temporary = stack.enter_context(self._temporary(name))
                file = Streamed(temporary)
                stack.callback(file.close)
            yield _Told(file, told)
            with told():
                file.sync()
                temporary.replace(self.path(name))
                sync_folder(self.path(name).parent)

    @contextmanager
    def _temporary(self, name: str) -> Iterator[Path]:
        target = self.path(name)
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_name(f".{target.name}{TEMPORARY}{uuid.uuid4().hex}")
        try:
            yield temporary
        finally:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)


class ObjectFiles:
    """Files in an object store, by whole PUTs; `create` is a conditional one."""

    def __init__(self, fs: AbstractFileSystem, path: str, url: str, secrets: Collection[str] = ()) -> None:
        self.fs = fs
        self._path = path.rstrip("/")
        self._url = without_credentials(url).rstrip("/")
        self._secrets = secrets

    def where(self, name: str = "") -> str:
        return f"{self._url}/{name}" if name else self._url

    def read(self, name: str, offset: int = 0) -> bytes | None:
        with self._told(name), if_there():
            return bytes(self.fs.cat_file(self._full(name)))[offset:]
        return None

    def read_into(self, name: str, offset: int, buffer: memoryview) -> int | None:
        with self._told(name), if_there():
            try:
                data = self.fs.cat_file(self._full(name), start=offset, end=offset + len(buffer))
            except OSError as error:
                if past_the_end(error):
                    return 0
                raise
            buffer[: len(data)] = data
            return len(data)
        return None

    def replace(self, name: str, data: bytes) -> None:
        with self._told(name):
            self.fs.pipe_file(self._full(name), data)

    def create(self, name: str, data: bytes) -> bool:
        if not creates_atomically(self.fs):
            protocol = self.fs.protocol if isinstance(self.fs.protocol, str) else self.fs.protocol[0]
            raise StoreError(f"{self.where(name)}: {protocol} cannot create a file only if absent, which a run needs")
        try:
            self.fs.pipe_file(self._full(name), data, mode="create")
            return True
        # A refusal is FileExistsError from one server and OSError(22) from another, and a lost reply, raised in any
        # class, may hide one's own success: only the file itself tells.
        except Exception:
            found = self.read(name)
            if found is None:
                with self._told(name):
                    raise
            return found == data

    def replace_if(self, name: str, data: bytes, gives_way: Callable[[], bool]) -> bool:
        written = False
        while not written:
            with self._told(name):
                tag = tag_of(self.fs, self._full(name))
            if not gives_way():
                return False
            if tag == "":
                written = self.create(name, data)  # it was removed
                continue
            with self._told(name):
                written = replace_tagged(self.fs, self._full(name), data, tag)
        return True

    def remove(self, name: str) -> None:
        with self._told(name), suppress(FileNotFoundError):
            self.fs.rm_file(self._full(name))

    def names(self, folder: str) -> list[str]:
        return sorted(self._entries(folder, "file"))

    def sizes(self, folder: str) -> dict[str, int]:
        return dict(sorted(self._entries(folder, "file").items()))

    def folders(self, folder: str) -> list[str]:
        return sorted(self._entries(folder, "directory"))

    def remove_folder(self, folder: str) -> None:
        with self._told(folder), suppress(FileNotFoundError):
            self.fs.invalidate_cache(self._full(folder))
            self.fs.rm(self._full(folder), recursive=True)

    def drop_unfinished(self, folder: str, which: Callable[[str], bool] = bool) -> int:
        what = "unfinished uploads (s3:ListBucketMultipartUploads, s3:AbortMultipartUpload)"
        with _told(f"{self.where(folder)}, {what}", Exception, self._secrets):
            return abort_uploads(self.fs, self._full(folder), which)

    def _entries(self, folder: str, kind: str) -> dict[str, int]:
        """Name and size of each entry of that kind."""
        entries: list[dict[str, Any]] = []
        with self._told(folder), if_there():
            self.fs.invalidate_cache(self._full(folder))
            entries = self.fs.ls(self._full(folder), detail=True)
        return {e["name"].rstrip("/").rpartition("/")[2]: e["size"] for e in entries if e["type"] == kind}

    @contextmanager
    def stream(self, name: str) -> Iterator[Sink]:
        with self._told(name):
            file = open_upload(self.fs, self._full(name))
        try:
            yield _Told(file, partial(self._told, name))
            with self._told(name):
                file.close()
        except BaseException:
            with suppress(Exception):  # the store may be what failed
                file.discard()
            # Closing commits what was written so far, and the garbage collector closes all that is not closed.
            if isinstance(file, AbstractBufferedFile):
                file.closed = True
            raise

    def _full(self, name: str) -> str:
        return f"{self._path}/{name}" if name else self._path

    def _told(self, name: str) -> AbstractContextManager[None]:
        # The clients of object stores have no base of their errors in common but Exception.
        return _told(self.where(name), Exception, self._secrets)


class _Told:
    """A file whose failures are StoreErrors."""

    def __init__(self, file: Sink, told: Callable[[], AbstractContextManager[None]]) -> None:
        self._file, self._told = file, told

    def write(self, data: bytes | memoryview) -> None:
        with self._told():
            self._file.write(data)


@contextmanager
def _told(
    where: str, kind: type[Exception] | tuple[type[Exception], ...], secrets: Collection[str] = ()
) -> Iterator[None]:
    """Turns errors of that kind into StoreErrors, without the secrets."""
    try:
        yield
    except StoreError:
        raise
    except kind as error:
        told = StoreError(f"{where}: {explain(error, secrets)}")
        if not reveals(error, secrets):
            raise told from error
        told.passes, told.full = transient(error), full(error)
        raise told from None
