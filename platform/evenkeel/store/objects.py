"""What object stores do that fsspec has no word for, or does not do alike for all."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from fsspec.asyn import AsyncFileSystem
from fsspec.spec import AbstractFileSystem

from evenkeel.store.failures import no_bucket, refuses_condition


def creates_atomically(fs: AbstractFileSystem) -> bool:
    """Whether pipe_file(mode="create") is the file system's own: the inherited one looks first and writes then."""
    if isinstance(fs, AsyncFileSystem):
        return type(fs)._pipe_file is not AsyncFileSystem._pipe_file
    return type(fs).pipe_file is not AbstractFileSystem.pipe_file


@contextmanager
def if_there() -> Iterator[None]:
    """Ends its block where a file is not found; that a whole bucket is not remains an error."""
    try:
        yield
    except FileNotFoundError as error:
        if no_bucket(error):
            raise


def tag_of(fs: AbstractFileSystem, path: str) -> str | None:
    """What S3 calls a file as it is now (its ETag); "" if there is none, and None where files have no tags."""
    if "s3" not in fs.protocol:
        return None
    with if_there():
        return str(fs.info(path, refresh=True).get("ETag", "")) or None
    return ""


def replace_tagged(fs: AbstractFileSystem, path: str, data: bytes, tag: str | None) -> bool:
    """Writes the whole file if the store still calls it `tag`, and answers False if it is gone or called otherwise.

    Unconditionally only where files have no tags, or the server does not know the condition: it says so, or refuses
    the tag that it gives out as before. What is raised is the client's.
    """
    # Ceph 16 gives it out in quotes and knows it only without; others may insist on the quotes, which HTTP demands.
    for match in () if tag is None else (tag.strip('"'), tag):
        try:
            fs.pipe_file(path, data, IfMatch=match)
            return True
        except Exception as error:
            if tag_of(fs, path) != tag:
                return False  # somebody was quicker; or it was this very call, and the reply was lost
            if not refuses_condition(error):
                raise
    fs.pipe_file(path, data)
    return True


def abort_uploads(fs: AbstractFileSystem, folder: str, which: Callable[[str], bool]) -> int:
    """Drops what was uploaded of files that were never finished; of how many. See Files.drop_unfinished.

    Other object stores drop an upload by themselves when it is not gone on with; on S3 its parts stay, and cost.
    """
    if "s3" not in fs.protocol:
        return 0
    found = 0
    bucket, prefix, _ = fs.split_path(f"{folder}/")
    page: dict[str, Any] = {"IsTruncated": True}
    while page.get("IsTruncated"):
        at = {f"{k}Marker": page[f"Next{k}Marker"] for k in ("Key", "UploadId") if f"Next{k}Marker" in page}
        page = fs.call_s3("list_multipart_uploads", Bucket=bucket, Prefix=prefix, **at)
        for upload in page.get("Uploads", []):
            if not which(upload["Key"].removeprefix(prefix)):
                continue
            with suppress(FileNotFoundError):  # just finished or dropped
                fs.abort_mpu(bucket, upload["Key"], upload["UploadId"])
            found += 1
    return found
