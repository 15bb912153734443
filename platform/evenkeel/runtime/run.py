"""The life of a run, seen from the process that the user started: checked, begun or found, followed, summed up."""

import re
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from importlib import metadata
from typing import Any, TextIO

from evenkeel.config import ConfigError, to_yaml
from evenkeel.control.messages import End
from evenkeel.observe.console import Console, summary_text
from evenkeel.runtime.cluster import NoClusterError, NotEnoughError, RayUsed, check_cluster, ray_for
from evenkeel.runtime.look import check_same, check_shared, look, what_it_keeps
from evenkeel.runtime.origin import RESUME, check_fit, version_to_resume
from evenkeel.runtime.prepare import Prepared, environment
from evenkeel.runtime.signals import STOPPED, Stopped, StopRequests
from evenkeel.store.errors import StoreError
from evenkeel.store.lease import (
    LEASE_S,
    RENEW_S,
    Holder,
    LeaseHeld,
    LeaseLost,
    Tenure,
    Watch,
    acquire,
    read_lease,
    succeed,
)
from evenkeel.store.run_directory import RunDirectory, RunRecord

FINISHED, BAD_INPUT, FAILED, INTERRUPTED = 0, 2, 3, 130
"""Exit statuses (design, section 10)."""
ADDRESS = "RAY_ADDRESS"
TRACEBACK = b"Traceback (most recent call last)"


@dataclass(frozen=True, slots=True)
class Outcome:
    """How following a run ended. `status` is the exit status; `error` is one line, "" if there is nothing to say."""

    status: int
    error: str = ""


def run_prepared(prepared: Prepared, out: TextIO, version: str, resume: str = "auto") -> Outcome:
    """Begins the run, goes on with it, or finds it where it is already, and follows it to its end.

    Args:
        version: of evenkeel, for run.json.
        resume: "auto" goes on from the newest complete checkpoint, "never" begins anew, as the run did at first, a
            number is the step of the checkpoint to go on from.

    Raises:
        ConfigError: it cannot be begun like this; nothing was started or left.
        StoreError: the run directory cannot be read or written.
    """
    check_shared(prepared.config)
    with StopRequests() as requests:
        try:
            record = look(prepared)
            if is_done(prepared, record, resume):
                _say_summary(prepared, out)
                return Outcome(FINISHED)
            variables, begun = environment(prepared.config), record is not None
            if not begun:  # else it may be running, and this process only look on
                check_fit(prepared)
            with ray_for(prepared.need, variables, begun) as used:
                requests.check()
                start = _Start(prepared, version, resume, {} if used.own else variables, used, begun)
                return _run_on_ray(start, requests, out)
        except NotEnoughError as error:
            raise prepared.config.error("scaling.workers", str(error)) from None
        except NoClusterError as error:
            raise ConfigError(str(error), ADDRESS) from None
        except Stopped as stopped:
            return Outcome(STOPPED, str(stopped))


def is_done(prepared: Prepared, record: RunRecord | None, resume: str) -> bool:
    """Whether it has finished, and nothing more is asked for."""
    finished = record is not None and record.status == "finished"
    return finished and resume == "auto" and not _has_more_steps(prepared)


@dataclass(frozen=True, slots=True)
class _Start:
    """What a run is started with.

    Attributes:
        env_vars: for its processes.
        begun: there has been a run in this directory before.
    """

    prepared: Prepared
    version: str
    resume: str
    env_vars: Mapping[str, str]
    used: RayUsed
    begun: bool


def _run_on_ray(start: _Start, requests: StopRequests, out: TextIO) -> Outcome:
    from evenkeel.runtime import driver
    from evenkeel.runtime.compat import cluster_id

    config, directory = start.prepared.config, start.prepared.directory
    cluster, notes, running = cluster_id(), list[str](), config

    def check_room() -> None:
        short = check_cluster(start.prepared.need, start.used, start.begun)
        notes[:] = [f"it goes on with fewer: {short}"] if short else []

    try:
        found = find_or_take(config.run.name, directory, cluster, requests.wait, check_room)
    except LeaseHeld:
        requests.check()
        raise
    if isinstance(found, Tenure):
        controller = _begin(start, found, cluster, requests)
        notes += [start.prepared.note] if start.prepared.note else []
    else:
        controller = found
        driver.check_folder(controller, directory.url)
        running = check_same(start.prepared)  # which it may not have been there for before
        notes = what_it_keeps(running, config)
        if start.resume != "auto":
            raise ConfigError(f"the run is running in {directory.url}; stop it before you go back", RESUME)
    if controller is None:
        _say_summary(start.prepared, out)
        return Outcome(FINISHED)
    try:
        with Console(running.train.steps, out) as console:
            for line in (f"run {config.run.name} in {directory.url}", *notes):
                console.say(line)
            end = driver.attend(config.run.name, controller, requests, _shower(console))
    except driver.InterruptedTwiceError:
        with suppress(StoreError):
            settle_status(directory, End("stopped", "interrupted"), cluster)
        return Outcome(INTERRUPTED, "interrupted; every process of the run was killed")
    except driver.RayDiedError as error:
        end = End("failed", str(error))
    return _sum_up(start.prepared, end, cluster, out)


def _sum_up(prepared: Prepared, end: End, cluster: str, out: TextIO) -> Outcome:
    """A store that fails now, such as a full disk, changes nothing about how the run ended."""
    try:
        end = settle_status(prepared.directory, end, cluster)
        _say_summary(prepared, out)
        return _outcome(end, _tracebacks(end, prepared.directory))
    except StoreError as error:
        print(f"the run directory cannot be read or written any more: {error}", file=out, flush=True)
        return _outcome(end)


def _begin(start: _Start, tenure: Tenure, cluster: str, requests: StopRequests) -> Any | None:
    """Starts the controller, which takes the lease over; None if the run has been finished by somebody meanwhile."""
    from ray import cloudpickle  # not before its environment is set

    from evenkeel.runtime import driver

    prepared, directory = start.prepared, start.prepared.directory
    over = threading.Event()
    keeper = threading.Thread(target=_keep, args=(tenure, over), name="lease", daemon=True)
    keeper.start()
    try:
        record = look(prepared)  # again: now nobody else can change it
        done = is_done(prepared, record, start.resume)
        if not done:
            check_fit(prepared)
        base = None if done else version_to_resume(directory, start.resume)
        requests.check()
        if not done:
            write_beginning(prepared, versions(start.version), record)
            make = cloudpickle.dumps(prepared.maker)  # type: ignore[no-untyped-call]
            worker = replace(prepared.spec.worker, env_vars=start.env_vars, make=make)
            begun = len(directory.journal().read_all())
            spec = replace(prepared.spec, worker=worker, cluster=cluster, begun=begun, resume=base)
            return driver.start_controller(spec)
    except (ConfigError, StoreError, Stopped):
        _give_up(tenure, over, keeper)
        raise
    _give_up(tenure, over, keeper)
    return None


def _keep(tenure: Tenure, over: threading.Event) -> None:
    """Shows that this process is about to start the controller, until that has taken the lease over."""
    while not over.wait(RENEW_S):
        try:
            tenure.renew()
        except LeaseLost:
            return
        except StoreError:
            continue  # the next one may do


def _give_up(tenure: Tenure, over: threading.Event, keeper: threading.Thread) -> None:
    over.set()
    keeper.join()
    tenure.release()


def find_or_take(
    run: str,
    directory: RunDirectory,
    cluster: str,
    wait: Callable[[float], bool],
    check: Callable[[], None] = lambda: None,
) -> Any | Tenure:
    """The controller that runs the run in this cluster; or the lease, with which this process may start one.

    Args:
        wait: returns after so many seconds, or earlier and True to give up.
        check: called before anything is taken; what it raises comes through.

    Raises:
        LeaseHeld: it is running in another cluster; or `wait` said so.
    """
    from evenkeel.runtime import driver

    me = Holder.this(cluster)
    watch = Watch(directory.files)
    while True:
        controller = driver.find_controller(run)
        if controller is not None and not driver.has_ended(controller):
            return controller
        if controller is not None:
            driver.remove(controller)
        check()
        tenure = acquire(directory.files, me, wait)
        watch.look()
        if tenure is None and watch.unchanged_s >= LEASE_S:
            # Whoever took it in this cluster has started no controller, and shows no more that it is about to.
            tenure = succeed(directory.files, me, wait)
        if tenure is not None:
            return tenure
        if wait(watch.pause_s):
            raise LeaseHeld(f"{directory.url}: given up")


def settle_status(directory: RunDirectory, end: End, cluster: str) -> End:
    """How the run ended as run.json has it; `end` is written there if the controller could not do it any more.

    Nothing is written where another cluster has the run now.
    """
    record, lease = directory.read_run(), read_lease(directory.files)
    if record is None or (lease is not None and lease.holder.cluster != cluster):
        return end
    if not record.over:
        now = time.time()
        directory.write_run(replace(record, status=end.status, error=end.error, updated=now, ended=now))
        return end
    return End(record.status, record.error)


def _shower(console: Console) -> Callable[[Sequence[tuple[str, dict[str, Any]]]], None]:
    def show(lines: Sequence[tuple[str, dict[str, Any]]]) -> None:
        for text in (x["text"] for kind, x in lines if kind == "note"):
            console.say(text)
        console.show([x for kind, x in lines if kind == "metrics"], [x for kind, x in lines if kind == "event"])

    return show


def write_beginning(prepared: Prepared, versions: dict[str, str], before: RunRecord | None) -> None:
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


def _outcome(end: End, traces: Sequence[str] = ()) -> Outcome:
    match end.status:
        case "finished":
            return Outcome(FINISHED)
        case "stopped":
            return Outcome(STOPPED, f"stopped on request ({end.error})")
        case _:
            return Outcome(FAILED, end.error + (f" (traceback in {', '.join(traces)})" if traces else ""))


def _tracebacks(end: End, directory: RunDirectory) -> list[str]:
    """The logs of the processes that the error names, where these hold one."""
    logs = (f"logs/{name}.log" for name in re.findall(r"\bw\d{4,}\b|\bcontroller\b", end.error))
    return [directory.files.where(log) for log in logs if TRACEBACK in (directory.files.read(log) or b"")]


def _has_more_steps(prepared: Prepared) -> bool:
    return prepared.config.train.steps > max((line["step"] for line in prepared.directory.metrics()), default=0)


def _say_summary(prepared: Prepared, out: TextIO) -> None:
    directory = prepared.directory
    record = directory.read_run()
    if record is not None:
        text = summary_text(asdict(record), directory.metrics(), directory.events(), directory.url)
        print(text, file=out, flush=True)
