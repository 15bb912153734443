"""One Ray for all tests of this folder."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from ray_runs import Site, marked

from evenkeel.runtime.names import NAMESPACE

CPUS = 6


@pytest.fixture(scope="session")
def shared_ray() -> Iterator[str]:
    """The address of a Ray with CPUS logical CPUs that all tests share."""
    os.environ["RAY_AUTH_MODE"] = "disabled"
    os.environ["OMP_NUM_THREADS"] = "1"
    folder = tempfile.mkdtemp(prefix="ek-ray-", dir="/tmp")
    import ray

    ray.init(
        address="local",
        num_cpus=CPUS,
        include_dashboard=False,
        log_to_driver=False,
        object_store_memory=80 * 2**20,
        _temp_dir=folder,
    )
    yield ray.get_runtime_context().gcs_address
    ray.shutdown()
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def site(tmp_path: Path, shared_ray: str) -> Iterator[Site]:
    """Runs on the shared Ray; nothing of them may be left on it."""
    import ray

    site = Site(tmp_path, shared_ray)
    yield site
    for started in site.started:
        started.kill()
    left = [e["name"] for e in ray.util.list_named_actors(all_namespaces=True) if e["namespace"] == NAMESPACE]
    for name in left:
        ray.kill(ray.get_actor(name, NAMESPACE))
    assert left == []


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[Site]:
    """Runs that each start a Ray of their own; no process of them may be left."""
    site = Site(tmp_path, "local")
    yield site
    for started in site.started:
        started.kill()
    left = [process for started in site.started for process in marked(started.mark)]
    for process in left:
        process.kill()
    assert left == []
