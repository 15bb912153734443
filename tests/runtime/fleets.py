"""A Fleet of one worker on a real Ray, from a plain process: what it tells of a worker that does not get far.

Run as a program it starts a Ray of its own whose memory monitor is content with nothing, and ends every worker.
"""

import asyncio
import os
import shutil
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ray
from ray import cloudpickle

from evenkeel.control import messages as m
from evenkeel.runtime.fleet import Fleet
from evenkeel.runtime.names import NAMESPACE
from evenkeel.runtime.spec import WorkerSpec
from evenkeel.runtime.tasks import Tasks

LIMIT_S = 120
PLATFORM = str(Path(__file__).parents[2] / "platform")
RUNTIME = {"env_vars": {"PYTHONPATH": PLATFORM}}


def worker(folder: str, kind: type[WorkerSpec] = WorkerSpec) -> WorkerSpec:
    """One that never gets ready."""
    make = cloudpickle.dumps(lambda worker_id: threading.Event().wait())
    return kind(folder, make, "cpu", {"CPU": 1.0}, RUNTIME["env_vars"])


async def loss(spec: WorkerSpec, then: Callable[[Any], object] = lambda actor: None) -> tuple[str, list[str]]:
    """Starts a worker, and returns the cause of its loss, and what else failed, once the fleet is closed.

    Args:
        then: what is done to the worker's actor at once.
    """
    heard: asyncio.Queue[m.Event] = asyncio.Queue()
    failed: list[str] = []
    fleet = Fleet("fleet", spec, None, heard.put_nowait, Tasks(lambda error: failed.append(repr(error))).spawn)
    fleet.start(1)
    then(ray.get_actor("fleet/w0001", NAMESPACE))
    event = await asyncio.wait_for(heard.get(), LIMIT_S)
    await asyncio.wait_for(fleet.close(), LIMIT_S)
    assert isinstance(event, m.WorkerLost)
    return event.cause, failed


def main() -> None:
    folder = tempfile.mkdtemp(prefix="ek-ray-", dir="/tmp")
    os.environ |= {"RAY_memory_usage_threshold": "0", "RAY_memory_monitor_refresh_ms": "100"}
    ray.init(
        address="local", num_cpus=1, include_dashboard=False, log_to_driver=False,
        object_store_memory=80 * 2**20, _temp_dir=folder,
    )  # fmt: skip
    print(*asyncio.run(loss(worker(sys.argv[1]))))
    ray.shutdown()
    shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
