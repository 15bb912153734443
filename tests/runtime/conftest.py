"""One Ray for all tests of this folder that are not about starting one."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from ray_runs import LOCAL, SAVING, Finished, Site, marked

from evenkeel.runtime.cluster import Need, ray_for
from evenkeel.runtime.names import NAMESPACE

CPUS = 6


@pytest.fixture(scope="session")
def shared_ray() -> Iterator[str]:
    """The address of a Ray with CPUS logical CPUs, to which this process is connected."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_ADDRESS", LOCAL)
        patch.setenv("RAY_AUTH_MODE", "disabled")
        patch.setenv("OMP_NUM_THREADS", "1")
        # Runs on a Ray that they were given have an environment of their own, and with it processes of their own.
        patch.setenv("RAY_prestart_worker_first_driver", "0")
        with ray_for(Need(CPUS, {"CPU": 1.0}), {}) as used:
            yield used.address


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("corpus") / "text.txt"
    path.write_bytes(bytes(range(32, 127)) * 100)
    return path


@pytest.fixture(scope="session")
def truth(tmp_path_factory: pytest.TempPathFactory, shared_ray: str, corpus: Path) -> Finished:
    """SAVING when nothing happens. It stays as it is: a test that goes on with it takes a copy."""
    done = Site(tmp_path_factory.mktemp("truth"), shared_ray, corpus).run(SAVING)
    assert (done.status, done.err) == (0, "")
    assert done.steps == list(range(1, SAVING["train"]["steps"] + 1))
    return done


@pytest.fixture
def site(tmp_path: Path, shared_ray: str, corpus: Path) -> Iterator[Site]:
    """Runs on the shared Ray; nothing of them may be left on it."""
    import ray

    site = Site(tmp_path, shared_ray, corpus)
    yield site
    for started in site.started:
        started.kill()
    left = [e["name"] for e in ray.util.list_named_actors(all_namespaces=True) if e["namespace"] == NAMESPACE]
    for name in left:
        ray.kill(ray.get_actor(name, NAMESPACE))
    assert left == []


@pytest.fixture
def alone(tmp_path: Path, corpus: Path) -> Iterator[Site]:
    """Runs that each start a Ray of their own; no process of them may be left."""
    site = Site(tmp_path, LOCAL, corpus)
    yield site
    for started in site.started:
        started.kill()
    left = [process for started in site.started for process in marked(started.mark)]
    for process in left:
        process.kill()
    assert left == []
