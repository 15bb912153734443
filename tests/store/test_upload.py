"""Files that go to S3 in parts, from the memory of whoever writes them: what arrives is what was written."""

import asyncio
import io
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from children import PART
from servers import BUCKET, KEY, S3, SECRET, Moto

from evenkeel.store.files import open_files
from evenkeel.store.upload import SEND_BYTES, SMALL_BYTES, Body

EDGES = [0, 1, SMALL_BYTES - 1, SMALL_BYTES, PART - 1, PART, PART + 1, 2 * PART - 1, 2 * PART, 2 * PART + 1]
WRITES = [1, 100, SMALL_BYTES - 1, SMALL_BYTES, SEND_BYTES + 1, 1 << 20, 3 << 20]


def pieces(data: bytes) -> Iterator[memoryview]:
    """All of it, in writes of many sizes."""
    rng, rest = random.Random(len(data)), memoryview(data)
    while rest:
        size = rng.choice(WRITES)
        yield rest[:size]
        rest = rest[size:]


def small_parts(url: str) -> dict[str, Any] | None:
    return {"default_block_size": PART} if url.startswith("s3:") else None


@pytest.mark.stores("moto", "rgw")
@pytest.mark.parametrize("size", EDGES)
def test_what_is_written_arrives(url: str, size: int) -> None:
    files, data = open_files(url, small_parts(url)), random.Random(size).randbytes(size)
    with files.stream("c/at once") as sink:
        sink.write(memoryview(data))
    with files.stream("c/in pieces") as sink:
        for piece in pieces(data):
            sink.write(piece)
    assert files.sizes("c") == {"at once": size, "in pieces": size}
    assert files.read("c/at once") == data
    assert files.read("c/in pieces") == data


@pytest.mark.filterwarnings("ignore:Unverified HTTPS request")
@pytest.mark.parametrize("size", [1, 2 * PART + 1])
def test_it_arrives_over_tls_too(tmp_path: Path, size: int) -> None:
    """Where the client sends it in chunks, with a checksum after them."""
    server = Moto(tmp_path, tls=True)
    try:
        reach = {"endpoint_url": server.s3.endpoint, "key": KEY, "secret": SECRET, "client_kwargs": {"verify": False}}
        files = open_files(f"s3://{BUCKET}", {"default_block_size": PART, **reach})
        data = random.Random(size).randbytes(size)
        with files.stream("a") as sink:
            for piece in pieces(data):
                sink.write(piece)
        assert files.read("a") == data
    finally:
        server.stop()


def test_it_is_sent_from_where_it_lies(moto_in_environment: S3) -> None:
    """Shown by what nobody may do: the memory is written to before the file is whole."""
    files, memory = open_files(f"s3://{BUCKET}/upload"), bytearray(SMALL_BYTES)
    with files.stream("a") as sink:
        sink.write(memoryview(memory))
        memory[:] = b"x" * SMALL_BYTES
    assert files.read("a") == memory


def test_a_body_is_read_like_any_other_file() -> None:
    rng = random.Random(1)
    parts = [rng.randbytes(size) for size in (1, 7, 100, 1, 1000, 3)]
    body, plain = Body([memoryview(part) for part in parts]), io.BytesIO(b"".join(parts))
    assert len(body) == len(plain.getvalue())
    for _ in range(1000):
        whence = rng.choice([0, 0, 1, 2])
        offset = rng.randint(0, len(body)) - (0, plain.tell(), len(body))[whence]
        assert body.seek(offset, whence) == plain.seek(offset, whence)
        for size in (rng.choice([0, 1, 5, 99, 5000]), rng.choice([1, 1000, -1, None])):
            assert body.read(size) == plain.read(size)
            assert body.tell() == plain.tell()


def test_a_body_is_sent_whole_each_time() -> None:
    data = random.Random(2).randbytes(3 * SEND_BYTES + 5)
    body = Body([memoryview(data[:10]), memoryview(data[10:])])

    async def sent() -> list[bytes]:
        return [bytes(piece) async for piece in body]

    body.read(100)
    for _ in range(2):
        told = asyncio.run(sent())
        assert b"".join(told) == data
        assert max(map(len, told)) <= SEND_BYTES
