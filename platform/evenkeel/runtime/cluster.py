"""The Ray that a run works on: the given cluster if there is one, else a local Ray of its own that ends with it."""

import logging
import os
import secrets
import shutil
import socket
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evenkeel.runtime.compat import (
    autoscaler_maximum,
    end_log_monitor,
    reread_environment,
    silence_ray,
    started_cluster,
)

OBJECT_STORE_BYTES = 80 * 2**20
"""Ray's least. Nothing of the training goes through the object store."""
QUIET = {
    "RAY_worker_niceness": "0",
    "RAY_enable_metrics_collection": "0",
    "RAY_task_events_report_interval_ms": "0",
    "RAY_event_stats": "0",
    "RAY_raylet_report_resources_period_milliseconds": "1000",
    "REPORTER_UPDATE_INTERVAL_MS": "60000",
    "RAY_DASHBOARD_AGENT_CHECK_PARENT_INTERVAL_S": "5",
}
"""For a local Ray, where the workers have no cores but those of Ray's own processes. It has no dashboard and only this
run's few actors, so that nobody reads what these would gather ten times a second; and by default it gives its workers
the lowest priority of the machine (nice 15). Saves 1.3 % of two cores. What the user has set stays."""
SOCKET_PATH_LIMIT = 40
"""For the temporary folder: Ray puts Unix sockets below it, whose whole path has at most 107 bytes."""


class NotEnoughError(ValueError):
    """More is asked for than this Ray could ever have; says what is there."""


@dataclass(frozen=True, slots=True)
class Need:
    """What a run takes at full strength: `count` times `each` resource, by Ray's names."""

    count: int
    each: Mapping[str, float]

    def total(self, name: str) -> float:
        return self.count * self.each.get(name, 0.0)


@dataclass(frozen=True, slots=True)
class RayUsed:
    """`own` is True for a local Ray that ends with this process."""

    own: bool
    address: str


def given_address() -> str | None:
    """The cluster to use: RAY_ADDRESS, or what `ray start` left on this machine and still answers. None: start one."""
    address = os.environ.get("RAY_ADDRESS", "")
    if address:
        return None if address == "local" else address
    found = started_cluster()
    return found if found is not None and _answers(found) else None


@contextmanager
def ray_for(need: Need, variables: Mapping[str, str]) -> Iterator[RayUsed]:
    """Connects to the given cluster or starts a local Ray, and takes back what it did.

    A Ray that this process is connected to already is used and left as it is.

    Args:
        variables: environment that a local Ray's processes take over, which is faster than a runtime environment.

    Raises:
        NotEnoughError: if the need could never be met.
        ConnectionError: if RAY_ADDRESS names a cluster that cannot be reached.
    """
    # Ray would ask on the terminal, and report home.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if "ray" in sys.modules and sys.modules["ray"].is_initialized():
        check_need(need, _capacity(), "the cluster")
        yield RayUsed(False, sys.modules["ray"].get_runtime_context().gcs_address)
        return
    address = given_address()
    if address is None:
        with _local_ray(need, variables) as used:
            yield used
        return
    import ray

    _connect(address=address)
    try:
        check_need(need, _capacity(), f"the cluster at {address}")
        yield RayUsed(False, address)
    finally:
        ray.shutdown()


@contextmanager
def _local_ray(need: Need, variables: Mapping[str, str]) -> Iterator[RayUsed]:
    missing = [n for n in need.each if n not in ("CPU", "GPU") and need.total(n) > 0]
    if missing:
        raise NotEnoughError(f"scaling.resources_per_worker.{missing[0]}: a local Ray has only CPU and GPU")
    if need.total("GPU"):
        check_need(Need(need.count, {"GPU": need.each["GPU"]}), {"GPU": _local_gpus()}, "this machine")
    folder = Path(tempfile.mkdtemp(prefix="evenkeel-", dir=_short_temp()))
    try:
        quiet = {name: value for name, value in QUIET.items() if name not in os.environ}
        with _environment({**variables, **quiet, **_authentication()}):
            import ray

            reread_environment()
            _connect(
                address="local",
                num_cpus=max(1, round(need.total("CPU"))),
                include_dashboard=False,
                object_store_memory=OBJECT_STORE_BYTES,
                _temp_dir=str(folder),
            )
            end_log_monitor()
            try:
                yield RayUsed(True, ray.get_runtime_context().gcs_address)
            finally:
                ray.shutdown()
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        reread_environment()


def _connect(**arguments: Any) -> None:
    import ray

    ray.init(log_to_driver=False, logging_level=logging.ERROR, configure_logging=True, **arguments)
    silence_ray()


def _authentication() -> dict[str, str]:
    """A token of its own for a local Ray: Ray would leave one in the home folder, which then bars other clusters.

    Nothing where the user has said it.
    """
    if "RAY_AUTH_MODE" in os.environ:
        return {}
    return {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}


@contextmanager
def _environment(variables: Mapping[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def check_need(need: Need, there: Mapping[str, float], where: str) -> None:
    """Raises NotEnoughError for the first resource of which there could never be enough."""
    for name in sorted(need.each):
        asked = need.total(name)
        if asked > there.get(name, 0.0):
            have = ", ".join(f"{_number(v)} {k}" for k, v in sorted(there.items()) if not _internal(k)) or "nothing"
            raise NotEnoughError(
                f"{need.count} workers (spares included) need {_number(asked)} {name}, but {where} has at most {have}"
            )


def _capacity() -> dict[str, float]:
    """Of each resource the most that the cluster has or could get."""
    import ray

    capacity = {k: float(v) for k, v in ray.cluster_resources().items()}  # type: ignore[no-untyped-call]
    for name, most in (autoscaler_maximum() or {}).items():
        capacity[name] = max(capacity.get(name, 0.0), most)
    return capacity


def _internal(resource: str) -> bool:
    return resource.startswith(("node:", "object_store", "memory", "accelerator_type"))


def _number(value: float) -> str:
    return f"{value:g}"


def _local_gpus() -> float:
    import torch

    return float(torch.cuda.device_count())


def _answers(address: str) -> bool:
    host, _, port = address.rpartition(":")
    try:
        with socket.create_connection((host, int(port)), timeout=2.0):
            return True
    except (OSError, ValueError):
        return False


def _short_temp() -> str:
    folder = tempfile.gettempdir()
    return folder if len(folder) <= SOCKET_PATH_LIMIT else "/tmp"
