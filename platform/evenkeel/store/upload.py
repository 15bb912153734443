"""Writing a file to an object store piece by piece."""

import io
import time
from typing import Any

from fsspec.spec import AbstractFileSystem

from evenkeel.store.failures import transient

PAUSES_S = (1.0, 4.0)
"""Before a part that failed is sent for the second time, and for the third; short, for they are not told."""
AGAIN_S = 10.0
"""A part that has failed for longer is not sent anew: the client is patient, too (options.py), and who writes nothing
for two minutes is taken for stuck."""


def open_upload(fs: AbstractFileSystem, path: str) -> Any:
    """A file that appears when it is closed, and not if it is discarded; what is raised is the client's."""
    return S3Upload(fs, path) if "s3" in fs.protocol else fs.open(path, "wb")


class S3Upload:
    """A file on S3, sent in parts of the file system's block size, one at a time, from one buffer.

    s3fs's own file takes each part through three buffers, each of fresh memory: their page faults cost 1.5 ms of CPU
    time a megabyte, five times what all of it takes here, and three parts are in memory at a time.
    """

    def __init__(self, fs: AbstractFileSystem, path: str) -> None:
        self._fs = fs
        bucket, key, _ = fs.split_path(path)
        self._object = {"Bucket": bucket, "Key": key}
        self._buffer = io.BytesIO()
        self._upload: str | None = None
        self._parts: list[dict[str, Any]] = []

    def write(self, data: bytes | memoryview) -> None:
        view = memoryview(data).cast("B")
        while view:
            room = self._fs.default_block_size - self._buffer.tell()
            self._buffer.write(view[:room])
            view = view[room:]
            if self._buffer.tell() == self._fs.default_block_size:
                self._send()

    def close(self) -> None:
        """Commits what was written; a small file in one request."""
        if self._upload is None:
            self._fs.call_s3("put_object", **self._object, Body=self._filled())
            return
        if self._buffer.tell():
            self._send()
        parts = {"Parts": self._parts}
        self._fs.call_s3("complete_multipart_upload", **self._object, UploadId=self._upload, MultipartUpload=parts)
        self._upload = None

    def discard(self) -> None:
        """Drops what was sent; else it would stay, unseen, and cost."""
        if self._upload is not None:
            self._fs.abort_mpu(self._object["Bucket"], self._object["Key"], self._upload)
            self._upload = None

    def _send(self) -> None:
        if self._upload is None:
            self._upload = self._fs.call_s3("create_multipart_upload", **self._object)["UploadId"]
        number = len(self._parts) + 1
        sent = self._sent({**self._object, "UploadId": self._upload, "PartNumber": number})
        self._parts.append({"PartNumber": number, "ETag": sent["ETag"]})
        self._buffer.seek(0)

    def _sent(self, to: dict[str, Any]) -> Any:
        """The server's answer to a part; one that fails in a way that passes is sent anew, and none before it."""
        body, began = self._filled(), time.monotonic()
        for pause_s in PAUSES_S:
            try:
                return self._fs.call_s3("upload_part", **to, Body=body)
            except Exception as error:  # the clients of stores have no base of their errors in common
                if not transient(error) or time.monotonic() - began > AGAIN_S:
                    raise
            time.sleep(pause_s)
            body.seek(0)
        return self._fs.call_s3("upload_part", **to, Body=body)

    def _filled(self) -> io.BytesIO:
        """What is in the buffer, to be read; not what an earlier part, which was longer, left behind it."""
        self._buffer.truncate()
        self._buffer.seek(0)
        return self._buffer
