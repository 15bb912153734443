from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest

from evenkeel.store.files import Files, open_files


@pytest.fixture(params=["local", "memory"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """A root of its own, on disk and in an object store's semantics (whole PUTs)."""
    if request.param == "local":
        yield str(tmp_path / "deep" / "root")
        return
    yield f"memory://{tmp_path.name}"
    fs = fsspec.filesystem("memory")
    if fs.exists(f"/{tmp_path.name}"):
        fs.rm(f"/{tmp_path.name}", recursive=True)


@pytest.fixture
def files(url: str) -> Files:
    return open_files(url)
