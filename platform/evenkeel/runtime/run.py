"""The life of a run, seen from the process that the user started: checked, begun or found, followed, summed up."""

import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib import metadata
from typing import Any, TextIO

from evenkeel.config import ConfigError, config_from_yaml, differences, stored_fingerprint, to_yaml
from evenkeel.control.messages import End
from evenkeel.core.ids import INITIAL, Version
from evenkeel.observe.console import Console, summary_text
from evenkeel.runtime import saving
from evenkeel.runtime.cluster import NotEnoughError, ray_for
from evenkeel.runtime.prepare import Prepared, environment
from evenkeel.store.errors import StoreError
from evenkeel.store.lease import LEASE_S, LOOK_S, Holder, Tenure, acquire, succeed
from evenkeel.store.run_directory import RunDirectory, RunRecord

FINISHED, BAD_INPUT, FAILED, INTERRUPTED, STOPPED = 0, 2, 3, 130, 143
"""Exit statuses (design, section 10)."""
RESUME = "--resume"


@dataclass(frozen=True, slots=True)
class Outcome:
    """How following a run ended. `status` is the exit status; `error` is one line, "" if there is nothing to say."""

    status: int
    error: str = ""


def run_prepared(prepared: Prepared, out: TextIO, version: str, resume: str = "auto") -> Outcome:
    """Begins the run, goes on with it, or finds it where it is already, and follows it to its end.

    Args:
        version: of evenkeel, for run.json.
        resume: "auto" goes on from the newest complete checkpoint, "never" begins anew, a number is the step of the
            checkpoint to go on from.

    Raises:
        ConfigError: it cannot be begun like this; nothing was started or left.
        StoreError: the run directory cannot be read or written.
    """
    directory = prepared.directory
    record = directory.read_run()
    if record is not None:
        check_same(prepared)
        if record.status == "finished" and resume == "auto" and not _has_more_steps(prepared):
            _say_summary(prepared, out)
            return Outcome(FINISHED)
    else:
        RunDirectory.at(prepared.config.run.storage_path).check_writable()
    with ExitStack() as stack:
        try:
            variables = environment(prepared.config)
            used = stack.enter_context(ray_for(prepared.need, variables))
        except NotEnoughError as error:
            raise prepared.config.error("scaling.workers", str(error)) from None
        begin = partial(write_beginning, prepared, versions(version), record)
        return _run_on_ray(prepared, begin, resume, out, {} if used.own else variables)


def check_same(prepared: Prepared) -> None:
    """Raises ConfigError for the first key that differs from that of the run in this directory, and may not."""
    config, directory = prepared.config, prepared.directory
    text = directory.read_config()
    where = f"{directory.url}/config.yaml"
    if text is None:
        raise ConfigError("is missing beside run.json", source=where)
    for key, old, new in differences(config_from_yaml(text, where), config):
        raise config.error(key, f"is {new!r}, but the run in {directory.url} has {old!r}; choose another run.name")
    if stored_fingerprint(text) != prepared.fingerprint:
        what = f"{config.data.path} is not the data that the run in {directory.url} began with"
        raise config.error("data.path", f"{what}; choose another run.name")


def _run_on_ray(
    prepared: Prepared, begin: Callable[[], None], resume: str, out: TextIO, env_vars: Mapping[str, str]
) -> Outcome:
    from ray import cloudpickle  # not before its environment is set

    from evenkeel.runtime import driver
    from evenkeel.runtime.compat import cluster_id

    config, directory = prepared.config, prepared.directory
    cluster = cluster_id()
    found = find_or_take(config.run.name, directory, cluster)
    if not isinstance(found, Tenure):
        controller = found
        driver.check_folder(controller, directory.url)
        if resume != "auto":
            raise ConfigError(f"the run is running in {directory.url}; stop it before you go back", RESUME)
    else:
        try:
            base = version_to_resume(directory, resume)
            begin()
        except (ConfigError, StoreError):
            found.release()
            raise
        make = cloudpickle.dumps(prepared.maker)  # type: ignore[no-untyped-call]
        worker = replace(prepared.spec.worker, env_vars=env_vars, make=make)
        begun = len(directory.journal().read_all())
        spec = replace(prepared.spec, worker=worker, cluster=cluster, begun=begun, resume=base)
        controller = driver.start_controller(spec)
    try:
        with Console(config.train.steps, out) as console:
            console.say(f"run {config.run.name} in {directory.url}")
            end = driver.attend(config.run.name, controller, _shower(console))
    except driver.InterruptedTwiceError:
        return Outcome(INTERRUPTED, "interrupted; every process of the run was killed")
    end = settle_status(directory, end)
    _say_summary(prepared, out)
    return _outcome(end, directory)


def find_or_take(run: str, directory: RunDirectory, cluster: str) -> Any | Tenure:
    """The controller that runs the run in this cluster; or the lease, with which this process may start one.

    Raises:
        LeaseHeld: it is running in another cluster.
    """
    from evenkeel.runtime import driver

    deadline = time.monotonic() + LEASE_S
    wait = threading.Event().wait
    while True:
        controller = driver.find_controller(run)
        if controller is not None:
            return controller
        tenure = acquire(directory.files, Holder.this(cluster), wait)
        if tenure is None and time.monotonic() > deadline:
            # Whoever took it in this cluster has started no controller, and Ray knows of none.
            tenure = succeed(directory.files, Holder.this(cluster), wait, 0)
        if tenure is not None:
            return tenure
        wait(LOOK_S)


def version_to_resume(directory: RunDirectory, resume: str) -> Version | None:
    """The version that is asked for; None to leave the choice to the controller.

    Raises:
        ConfigError: there is no complete checkpoint of that step.
    """
    if resume == "auto":
        return None
    if resume == "never":
        return INITIAL if directory.exists() else None
    saved, damaged = saving.find(directory)
    for version in saved:
        if version.step == int(resume):
            return version
    there = f"there are {', '.join(str(v.step) for v in saved)}" if saved else "there is none"
    beside = "".join(f"; {error}" for error in damaged)
    raise ConfigError(f"{directory.url} has no complete checkpoint of step {resume}; {there}{beside}", RESUME)


def settle_status(directory: RunDirectory, end: End) -> End:
    """How the run ended as run.json has it; `end` is written there if the controller could not do it any more."""
    record = directory.read_run()
    if record is None:
        return end
    if not record.over:
        now = time.time()
        directory.write_run(replace(record, status=end.status, error=end.error, updated=now, ended=now))
        return end
    return End(record.status, record.error)


def _shower(console: Console) -> Callable[[Sequence[tuple[str, dict[str, Any]]]], None]:
    def show(lines: Sequence[tuple[str, dict[str, Any]]]) -> None:
        console.show([x for kind, x in lines if kind == "metrics"], [x for kind, x in lines if kind == "event"])

    return show


def write_beginning(prepared: Prepared, versions: dict[str, str], before: RunRecord | None = None) -> None:
    """What a run directory holds before the controller starts; run.json comes last, for it says that there is a run.

    Args:
        before: of the run that goes on.
    """
    now = time.time()
    prepared.directory.write_config(to_yaml(prepared.config, prepared.fingerprint))
    started = now if before is None else before.started
    prepared.directory.write_run(RunRecord(prepared.config.run.name, "starting", started, now, versions=versions))


def versions(evenkeel: str) -> dict[str, str]:
    """Of what decides how a run goes; without importing any of it."""
    found = {"evenkeel": evenkeel, "python": sys.version.split()[0]}
    for name in ("torch", "ray"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def _outcome(end: End, directory: RunDirectory) -> Outcome:
    match end.status:
        case "finished":
            return Outcome(FINISHED)
        case "stopped":
            return Outcome(STOPPED, f"stopped on request ({end.error})")
        case _:
            logs = directory.log_folder
            return Outcome(FAILED, end.error + (f" (tracebacks are in {logs})" if logs else ""))


def _has_more_steps(prepared: Prepared) -> bool:
    return prepared.config.train.steps > max((line["step"] for line in prepared.directory.metrics()), default=0)


def _say_summary(prepared: Prepared, out: TextIO) -> None:
    directory = prepared.directory
    record = directory.read_run()
    if record is not None:
        text = summary_text(asdict(record), directory.metrics(), directory.events(), directory.url)
        print(text, file=out, flush=True)
