"""An S3 server of our own, a real one: Ceph's RADOS gateway, where its programs are installed."""

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from bench.process import BenchError

SERVERS = Path(__file__).resolve().parents[2] / "tests" / "store"
"""Where the tests start the same server."""


@dataclass(frozen=True, slots=True)
class Store:
    """A server that is running: its name, an empty folder in it, and what a user would set to reach it."""

    name: str
    url: str
    environment: Mapping[str, str]


@contextmanager
def s3_server(folder: Path) -> Iterator[Store]:
    """One that was never used before, which ends with the block.

    Args:
        folder: for what it writes.

    Raises:
        BenchError: if none can be started; says what to install.
    """
    if str(SERVERS) not in sys.path:
        sys.path.append(str(SERVERS))
    try:
        import s3fs  # noqa: F401 - what speaks to it
        import servers
    except ImportError as error:
        raise BenchError(f"{error.name} is not installed; make setup installs it") from error
    if missing := servers.ceph_missing():
        raise BenchError(f"no S3 server: {', '.join(missing)} not installed; get them with: {servers.CEPH_MISSING}")
    try:
        server = servers.Ceph(folder)
    except (AssertionError, OSError) as error:
        raise BenchError(f"Ceph RGW did not start: {str(error).splitlines()[0]}") from error
    try:
        yield Store("Ceph RGW", f"s3://{servers.BUCKET}/bench", server.s3.environment)
    finally:
        server.stop()
