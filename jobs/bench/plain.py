"""The least that anybody has to do to write so many bytes durably, with checksums: what ours is measured against."""

import os
from collections.abc import Iterable
from pathlib import Path

from xxhash import xxh3_64

from evenkeel.store.checkpoint_part import WRITE_BYTES


def write_plainly(path: Path, data: Iterable[memoryview]) -> str:
    """Writes a file from its first byte to its last, and syncs it. Returns the checksum of all."""
    checksum = xxh3_64()
    with path.open("wb") as file:
        for view in data:
            for at in range(0, len(view), WRITE_BYTES):
                piece = view[at : at + WRITE_BYTES]  # still in the cache for the second pass over it
                checksum.update(piece)
                file.write(piece)
        file.flush()
        os.fsync(file.fileno())
    return checksum.hexdigest()
