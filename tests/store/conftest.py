import uuid
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest
import s3fs
from proxy import Proxy
from servers import BUCKET, S3, Ceph, Moto, options, require_ceph

from evenkeel.store.files import Files, open_files

SERVERS = ("moto", "rgw")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test with `url` runs on disk and in memory; one that is marked `stores(...)` over these servers, too."""
    if "store" not in metafunc.fixturenames:
        return
    marker = metafunc.definition.get_closest_marker("stores")
    servers = marker.args if marker else ()
    assert set(servers) <= set(SERVERS), servers
    marks = {"rgw": pytest.mark.rgw}
    names = ("local", "memory", *servers)
    # Of one scope with the servers, so that the tests of one server run together: clients are slow to build.
    metafunc.parametrize("store", [pytest.param(n, marks=marks.get(n, ())) for n in names], scope="session")


@pytest.fixture
def url(store: str, request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """A root of its own: on disk, or in an object store's semantics (whole PUTs)."""
    match store:
        case "local":
            yield str(tmp_path / "deep" / "root")
        case "memory":
            yield f"memory://{tmp_path.name}"
            fs = fsspec.filesystem("memory")
            if fs.exists(f"/{tmp_path.name}"):
                fs.rm(f"/{tmp_path.name}", recursive=True)
        case _:
            request.getfixturevalue(f"{store}_in_environment")
            yield f"s3://{BUCKET}/{tmp_path.name}-{uuid.uuid4().hex[:8]}/root"


@pytest.fixture
def files(url: str) -> Files:
    return open_files(url)


@pytest.fixture(scope="session")
def moto(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3]:
    server = Moto(tmp_path_factory.mktemp("moto"))
    yield server.s3
    server.stop()


@pytest.fixture(scope="session")
def ceph(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ceph]:
    """A real S3 server. Where it must be, that is in CI, a missing one is a failure."""
    require_ceph()
    server = Ceph(tmp_path_factory.mktemp("ceph"))
    yield server
    server.stop()


@pytest.fixture(scope="module")
def server(moto: S3) -> S3:
    """What is behind the link."""
    return moto


@pytest.fixture(scope="module")
def proxy(server: S3) -> Iterator[Proxy]:
    """One for all tests of a server, for then they share a client, which is slow to build."""
    proxy = Proxy(server.port)
    yield proxy
    proxy.close()


@pytest.fixture
def root(request: pytest.FixtureRequest) -> str:
    return f"s3://{BUCKET}/{abs(hash(request.node.nodeid)):x}"


@pytest.fixture
def link(proxy: Proxy) -> Iterator[Proxy]:
    yield proxy
    proxy.heal()


@pytest.fixture
def linked(link: Proxy, root: str) -> Files:
    return open_files(root, options(link))


@pytest.fixture(scope="session")
def last_used() -> list[S3]:
    """The server, if any, for which s3fs has built the clients that it keeps and gives out again."""
    return []


@pytest.fixture
def moto_in_environment(moto: S3, last_used: list[S3], monkeypatch: pytest.MonkeyPatch) -> S3:
    return _in_environment(moto, last_used, monkeypatch)


@pytest.fixture
def rgw_in_environment(ceph: Ceph, last_used: list[S3], monkeypatch: pytest.MonkeyPatch) -> S3:
    return _in_environment(ceph.s3, last_used, monkeypatch)


def _in_environment(server: S3, last_used: list[S3], monkeypatch: pytest.MonkeyPatch) -> S3:
    """As a user gives it to evenkeel."""
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
    if last_used != [server]:
        s3fs.S3FileSystem.clear_instance_cache()
        last_used[:] = [server]
    return server
