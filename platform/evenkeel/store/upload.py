"""Writing a file to an object store piece by piece."""

import time
from bisect import bisect_right
from collections.abc import AsyncIterator, Sequence
from itertools import accumulate
from typing import Any

from fsspec.spec import AbstractFileSystem

from evenkeel.store.failures import transient

PAUSES_S = (1.0, 4.0)
"""Before a part that failed is sent for the second time, and for the third; short, for they are not told."""
AGAIN_S = 10.0
"""A part that has failed for longer is not sent anew: the client is patient, too (options.py), and who writes nothing
for two minutes is taken for stuck."""
SMALL_BYTES = 64 << 10
"""Writes of less are copied together: each that is not is a call of its own to the network."""
SEND_BYTES = 256 << 10
"""Given to the network at a time."""


def open_upload(fs: AbstractFileSystem, path: str) -> Any:
    """A file that appears when it is closed, and not if it is discarded; what is raised is the client's."""
    return S3Upload(fs, path) if "s3" in fs.protocol else fs.open(path, "wb")


class S3Upload:
    """A file on S3, sent in parts of the file system's block size, one at a time, from the memory of who writes it.

    s3fs's own file takes each part through three buffers, each of fresh memory: their page faults cost 1.5 ms of CPU
    time a megabyte, and three parts are in memory at a time.
    """

    def __init__(self, fs: AbstractFileSystem, path: str) -> None:
        self._fs = fs
        bucket, key, _ = fs.split_path(path)
        self._object = {"Bucket": bucket, "Key": key}
        self._unsent: list[bytearray | memoryview] = []
        self._size = 0  # of what is not sent
        self._upload: str | None = None
        self._parts: list[dict[str, Any]] = []

    def write(self, data: bytes | memoryview) -> None:
        view = memoryview(data).cast("B")
        while view:
            some = view[: self._fs.default_block_size - self._size]
            self._keep(some)
            view = view[len(some) :]
            if self._size == self._fs.default_block_size:
                self._send()

    def close(self) -> None:
        """Commits what was written; a small file in one request."""
        if self._upload is None:
            self._fs.call_s3("put_object", **self._object, Body=Body(self._unsent))
            return
        if self._unsent:
            self._send()
        parts = {"Parts": self._parts}
        self._fs.call_s3("complete_multipart_upload", **self._object, UploadId=self._upload, MultipartUpload=parts)
        self._upload = None

    def discard(self) -> None:
        """Drops what was sent; else it would stay, unseen, and cost."""
        if self._upload is not None:
            self._fs.abort_mpu(self._object["Bucket"], self._object["Key"], self._upload)
            self._upload = None

    def _keep(self, view: memoryview) -> None:
        self._size += len(view)
        last = self._unsent[-1] if self._unsent else None
        if len(view) >= SMALL_BYTES:
            self._unsent.append(view)
        elif isinstance(last, bytearray):
            last += view
        else:
            self._unsent.append(bytearray(view))

    def _send(self) -> None:
        if self._upload is None:
            self._upload = self._fs.call_s3("create_multipart_upload", **self._object)["UploadId"]
        number = len(self._parts) + 1
        sent = self._sent({**self._object, "UploadId": self._upload, "PartNumber": number})
        self._parts.append({"PartNumber": number, "ETag": sent["ETag"]})
        self._unsent, self._size = [], 0

    def _sent(self, to: dict[str, Any]) -> Any:
        """The server's answer to a part; one that fails in a way that passes is sent anew, and none before it."""
        body, began = Body(self._unsent), time.monotonic()
        for pause_s in PAUSES_S:
            try:
                return self._fs.call_s3("upload_part", **to, Body=body)
            except Exception as error:  # the clients of stores have no base of their errors in common
                if not transient(error) or time.monotonic() - began > AGAIN_S:
                    raise
            time.sleep(pause_s)
            body.seek(0)
        return self._fs.call_s3("upload_part", **to, Body=body)


class Body:
    """What a client of S3 is to send: a file over pieces of memory, none of them empty, which stay as they are.

    It is read for a checksum and for a signature, and over TLS also to be sent. Else it is iterated over for that,
    always from its beginning, which copies nothing; a client that took it for a file (io.IOBase) would call another
    thread for every piece.
    """

    def __init__(self, pieces: Sequence[bytearray | memoryview]) -> None:
        self._views = [memoryview(piece) for piece in pieces]
        self._ends = list(accumulate(len(view) for view in self._views))
        self._at = 0

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = 0) -> int:
        self._at = offset + (0, self._at, len(self))[whence]
        return self._at

    def read(self, size: int | None = -1) -> bytes:
        stop = len(self) if size is None or size < 0 else min(self._at + size, len(self))
        some: list[memoryview] = []
        while self._at < stop:
            index = bisect_right(self._ends, self._at)
            view = self._views[index]
            start = self._ends[index] - len(view)
            some.append(view[self._at - start : stop - start])
            self._at += len(some[-1])
        return b"".join(some)

    async def __aiter__(self) -> AsyncIterator[memoryview]:
        for view in self._views:
            for at in range(0, len(view), SEND_BYTES):
                yield view[at : at + SEND_BYTES]
