"""Whatever Ray calls it when an actor is dead, it is heard, with its cause; and nothing fails unheard of."""

import asyncio
import io
import os
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import fleets
import pytest
import ray
from ray import cloudpickle
from ray_runs import FOREVER, Site, merged

from evenkeel.config import Config, load_config
from evenkeel.control import messages as m
from evenkeel.runtime import driver
from evenkeel.runtime.calls import ActorDead, reply
from evenkeel.runtime.names import NAMESPACE, controller_name
from evenkeel.runtime.prepare import prepare
from evenkeel.runtime.run import run_prepared
from evenkeel.runtime.spec import WorkerSpec
from evenkeel.runtime.tasks import Tasks
from evenkeel.runtime.worker_actor import Outbox
from evenkeel.store.lease import read_lease


class NoEnvironment(WorkerSpec):
    """Wants a runtime environment that cannot be set up."""

    def options(self) -> dict[str, Any]:
        return {**super().options(), "runtime_env": {"working_dir": "gcs://_ray_pkg_that_is_nowhere.zip"}}


def test_a_runtime_environment_that_cannot_be_set_up(shared_ray: str, tmp_path: Path) -> None:
    """RuntimeEnvSetupError, which is no RayActorError."""
    cause, failed = asyncio.run(fleets.loss(fleets.worker(str(tmp_path), NoEnvironment)))
    assert failed == []
    assert cause.startswith("its runtime environment could not be set up: ")


def test_an_actor_whose_constructor_raises(shared_ray: str) -> None:
    cause, failed = asyncio.run(fleets.loss(fleets.worker("no-such-protocol://x")))
    assert failed == []
    assert cause.startswith("it could not begin: ") and "no-such-protocol" in cause


def test_an_actor_that_is_killed(shared_ray: str, tmp_path: Path) -> None:
    assert asyncio.run(fleets.loss(fleets.worker(str(tmp_path)), ray.kill)) == ("its process died", [])


@pytest.mark.soak
def test_a_worker_that_ray_ends_for_want_of_memory(tmp_path: Path) -> None:
    """Ray's memory monitor, at work by default from 95 % on: OutOfMemoryError, which is no RayActorError."""
    environment = {**os.environ, "PYTHONPATH": fleets.PLATFORM, "RAY_AUTH_MODE": "disabled"}
    environment.pop("RAY_ADDRESS", None)
    command = [sys.executable, fleets.__file__, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=fleets.LIMIT_S, env=environment)
    assert done.stdout.startswith("out of memory: Ray ended its process"), done.stderr[-3000:]
    assert done.stdout.endswith(" []\n")


def test_a_controller_that_nobody_restarts(site: Site) -> None:
    started = site.start(FOREVER)
    started.after_step(2)
    ray.kill(ray.get_actor(controller_name("run"), NAMESPACE))
    done = started.finish()
    assert (done.status, done.err) == (3, "evenkeel: the controller is dead: its process died\n")


class OnceOnly(WorkerSpec):
    """Starts no worker once there was a world: a defect that shows in the background of the controller."""

    def options(self) -> dict[str, Any]:
        if Path(self.folder, "worlds").exists():
            raise TypeError("planned")
        return super().options()


def config(folder: Path, changes: dict[str, Any]) -> Config:
    text = folder / "text.txt"
    text.write_bytes(bytes(range(32, 127)) * 100)
    own = {"run": {"name": "own", "storage_path": str(folder)}, "data": {"path": str(text)}}
    return load_config([], values=merged({**own, **changes}))


def test_a_defect_in_the_background_ends_the_run(shared_ray: str, tmp_path: Path) -> None:
    cloudpickle.register_pickle_by_value(sys.modules[__name__])
    changes: dict[str, Any] = {
        "train": {"steps": 20_000},
        "scaling": {"workers": [1, 2]},
        "faults": [{"step": 3, "phase": "forward", "target": "rank:1", "kind": "kill"}],
    }
    prepared = prepare(config(tmp_path, changes))
    worker = OnceOnly(**{f.name: getattr(prepared.spec.worker, f.name) for f in fields(WorkerSpec)})
    outcome = run_prepared(replace(prepared, spec=replace(prepared.spec, worker=worker)), io.StringIO(), "0")
    assert outcome.status == 3
    assert outcome.error.startswith("internal error in the controller: TypeError: planned (traceback in ")


def test_a_controller_that_dies_again_and_again_without_a_step(
    shared_ray: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Like one that Ray's memory monitor ends, and restarts, and ends."""
    monkeypatch.setattr(driver, "MAX_IDLE_LIVES", 1)
    prepared = prepare(config(tmp_path, {}))
    files, me = prepared.directory.files, os.getpid()

    class Everything:
        """Nothing is left for workers."""

    hog = ray.remote(Everything).options(num_cpus=ray.cluster_resources()["CPU"]).remote()
    with ThreadPoolExecutor(1) as pool:
        run = pool.submit(run_prepared, prepared, io.StringIO(), "0")
        killed = {me}
        while not run.done():
            lease = read_lease(files)
            if lease is not None and lease.holder.pid not in killed:
                wait([run], timeout=1.0)  # so that the driver hears of it
                with suppress(ProcessLookupError):  # it was the last one
                    os.kill(lease.holder.pid, signal.SIGKILL)
                killed.add(lease.holder.pid)
            wait([run], timeout=0.1)
    ray.kill(hog)
    assert run.result().status == 3
    assert run.result().error.startswith("the controller died again and again without a step in between; ")
    assert len(killed) >= 3


def test_what_a_task_raises_is_told_at_once() -> None:
    async def one_fails() -> list[str]:
        told: list[str] = []
        tasks = Tasks(lambda error: told.append(repr(error)))
        well, ill = tasks.spawn(asyncio.sleep(0)), tasks.spawn(fails())
        await asyncio.wait([well, ill])
        return told

    async def fails() -> None:
        raise ValueError("no")

    assert asyncio.run(one_fails()) == ["ValueError('no')"]


def test_a_worker_that_can_tell_nothing_any_more_is_dead(shared_ray: str) -> None:
    class Deaf:
        def hear(self, event: m.Event) -> int:
            raise ValueError("deaf")

    class Teller:
        def tell(self, deaf: Any) -> None:
            outbox = Outbox(deaf, None)  # type: ignore[arg-type]
            outbox.begin(None)  # type: ignore[arg-type]
            outbox.put(m.Tick())
            threading.Event().wait()

    deaf, teller = (ray.remote(kind).options(runtime_env=fleets.RUNTIME).remote() for kind in (Deaf, Teller))
    call = teller.tell.remote(deaf)
    assert ray.wait([call], timeout=fleets.LIMIT_S)[0] == [call]
    with pytest.raises(ActorDead, match="its process died"):
        reply(call)
    ray.kill(deaf)
