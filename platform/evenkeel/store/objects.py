"""What object stores do that fsspec has no word for, or does not do alike for all."""

from contextlib import suppress
from typing import Any

from fsspec.asyn import AsyncFileSystem
from fsspec.spec import AbstractFileSystem

from evenkeel.store.failures import no_bucket


def creates_atomically(fs: AbstractFileSystem) -> bool:
    """Whether pipe_file(mode="create") is the file system's own: the inherited one looks first and writes then."""
    if isinstance(fs, AsyncFileSystem):
        return type(fs)._pipe_file is not AsyncFileSystem._pipe_file
    return type(fs).pipe_file is not AbstractFileSystem.pipe_file


def tag_of(fs: AbstractFileSystem, path: str) -> str:
    """What S3 calls a file as it is now (its ETag); "" if there is none, and on other stores."""
    if "s3" not in fs.protocol:
        return ""
    try:
        return str(fs.info(path, refresh=True).get("ETag", ""))
    except FileNotFoundError as error:
        if no_bucket(error):
            raise
        return ""


def abort_uploads(fs: AbstractFileSystem, folder: str) -> int:
    """Drops what was uploaded of files that were never finished; of how many.

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
            with suppress(FileNotFoundError):  # just finished or dropped
                fs.abort_mpu(bucket, upload["Key"], upload["UploadId"])
            found += 1
    return found
