"""The Ray that a run works on: the given cluster if there is one, else a local Ray of its own that ends with it."""

import json
import logging
import math
import os
import secrets
import shutil
import socket
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

from evenkeel.core.codec import CodecError, load
from evenkeel.runtime.compat import (
    autoscaler_maximum,
    end_log_monitor,
    own_sessions,
    reread_environment,
    sigterm_kept,
    silence_ray,
    started_cluster,
)
from evenkeel.store.lease import Holder
from evenkeel.store.untrusted import parse_json

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
SOCKET_PATH_LIMIT = 24
"""For the temporary folder. A Unix socket's path has at most 107 bytes, and Ray's longest has 82 more than this:
/evenkeel-01234567/session_2026-01-01_00-00-00_000000_1234567/sockets/plasma_store."""

PREFIX = "evenkeel-"
OWNER = "owner.json"
"""In the folder of a local Ray: the process that it ends with, which removes the folder."""
MOST_LEFTOVERS = 8
"""Folders of killed processes that a start removes; each holds some megabytes in hundreds of files."""
ANSWER_S = 5.0
HTTP2 = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes((0, 0, 0, 4, 0, 0, 0, 0, 0))
"""How a client begins: the preface, and a frame of settings that changes none."""
HTTP2_HEADER, HTTP2_SETTINGS = 9, 4
"""Bytes of a frame's header, the fourth of which is the kind of the frame."""
GRAIN = 4
"""Ray counts amounts of resources to so many decimal places."""


class NoClusterError(ConnectionError):
    """The given cluster cannot be joined; says which, and why."""


class NotEnoughError(ValueError):
    """More is asked for than this Ray could ever have; says what is there."""


@dataclass(frozen=True, slots=True)
class Need:
    """What a run takes at full strength: `count` times `each` resource, by Ray's names.

    Attributes:
        fewest: workers with which it still trains.
    """

    count: int
    each: Mapping[str, float]
    fewest: int = 1

    def total(self, name: str) -> float:
        return round(self.count * self.each.get(name, 0.0), GRAIN)

    def fits(self, node: Mapping[str, float]) -> int:
        """How many of the `count` one node with these resources could hold."""
        room = (_times(node.get(name, 0.0), amount, name == "GPU") for name, amount in self.each.items())
        return int(min([self.count, *room]))


@dataclass(frozen=True, slots=True)
class RayUsed:
    """`own` is True for a local Ray that ends with this process.

    Attributes:
        name: for messages.
        shortage: what does not fit on a local Ray; of a given cluster `check_cluster` tells.
    """

    own: bool
    address: str
    name: str
    shortage: str = ""


def given_address() -> str | None:
    """The cluster to use: RAY_ADDRESS, or what `ray start` left on this machine and still answers. None: start one."""
    address = os.environ.get("RAY_ADDRESS", "")
    if address:
        return None if address == "local" else address
    found = started_cluster()
    return found if found is not None and _answers(found) else None


@contextmanager
def ray_for(need: Need, variables: Mapping[str, str], begun: bool = False) -> Iterator[RayUsed]:
    """Connects to the given cluster or starts a local Ray, and takes back what it did.

    A Ray that this process is connected to already is used and left as it is. Whether a given cluster has room is not
    asked here: who only follows a run that is there takes none.

    Args:
        variables: environment that a local Ray's processes take over, which is faster than a runtime environment.
        begun: as of `shortage`.

    Raises:
        NotEnoughError: if a local Ray could never meet the need.
        NoClusterError: if the given cluster cannot be joined.
    """
    # Ray would ask on the terminal, and report home.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if "ray" in sys.modules and sys.modules["ray"].is_initialized():
        yield RayUsed(False, sys.modules["ray"].get_runtime_context().gcs_address, "the cluster")
        return
    address = given_address()
    if address is None:
        with _local_ray(need, variables, begun) as used:
            yield used
        return
    _join(address)
    import ray

    try:
        yield RayUsed(False, address, f"the cluster at {address}")
    finally:
        ray.shutdown()


def nodes_of(address: str | None) -> list[dict[str, float]]:
    """What each node of a running cluster has, by Ray's names of resources; of the one that is connected to, if any.

    Args:
        address: None: of the given one.

    Raises:
        NoClusterError: if there is none, or it cannot be joined.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if "ray" in sys.modules and sys.modules["ray"].is_initialized():
        return _nodes()
    found = address or given_address()
    if found is None:
        raise NoClusterError("no cluster runs here: RAY_ADDRESS is not set, and `ray start` left none; say --address")
    _join(found)
    import ray

    try:
        return _nodes()
    finally:
        ray.shutdown()


def _join(address: str) -> None:
    """Connects to a given cluster.

    Raises:
        NoClusterError: if that fails.
    """
    way_out = "name another one, or 'local' to train on this machine"
    if "://" in address:
        raise NoClusterError(f"{address!r} is not the host:port of a cluster's GCS; {way_out}")
    if address != "auto" and not _answers(address):
        raise NoClusterError(f"no cluster answers at {address!r}; {way_out}")
    import ray
    from ray.exceptions import RayError

    try:
        _connect(address=address)
    except (ConnectionError, RuntimeError, ValueError, RayError) as error:
        ray.shutdown()
        reason = str(error.__cause__ or error).strip().splitlines()[0]
        raise NoClusterError(f"no cluster can be joined at {address!r}: {reason}; {way_out}") from error


@contextmanager
def _local_ray(need: Need, variables: Mapping[str, str], begun: bool) -> Iterator[RayUsed]:
    missing = [n for n in need.each if n not in ("CPU", "GPU") and need.total(n) > 0]
    if missing:
        raise NotEnoughError(f"scaling.resources_per_worker.{missing[0]}: a local Ray has only CPU and GPU")
    name, short = "this machine", ""
    if need.total("GPU"):
        here = {"GPU": _local_gpus()}
        short = shortage(replace(need, each={"GPU": need.each["GPU"]}), begun, here, [here], name)
    remove_leftovers(Path(_short_temp()))
    folder = Path(tempfile.mkdtemp(prefix=PREFIX, dir=_short_temp()))
    (folder / OWNER).write_text(json.dumps(asdict(Holder.this(""))))
    try:
        quiet = {name: value for name, value in QUIET.items() if name not in os.environ}
        with _environment({**variables, **quiet, **_authentication()}):
            import ray

            reread_environment()
            with own_sessions():
                _connect(
                    address="local",
                    num_cpus=max(1, math.ceil(need.total("CPU"))),
                    include_dashboard=False,
                    object_store_memory=OBJECT_STORE_BYTES,
                    _temp_dir=str(folder),
                )
            end_log_monitor()
            try:
                yield RayUsed(True, ray.get_runtime_context().gcs_address, name, short)
            finally:
                ray.shutdown()
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        reread_environment()


def _connect(**arguments: Any) -> None:
    import ray

    with sigterm_kept():
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


def check_cluster(need: Need, used: RayUsed, begun: bool) -> str:
    """`shortage` of the Ray that this process is connected to."""
    return used.shortage if used.own else shortage(need, begun, *_capacity(), used.name)


def shortage(
    need: Need, begun: bool, total: Mapping[str, float], nodes: Sequence[Mapping[str, float]] | None, where: str
) -> str:
    """In one line what of the need there could never be enough of, as things are; "" if all of it may come.

    Args:
        begun: the run has begun before, maybe where there was more, and goes on with what is left.
        total, nodes: as of `check_need`.

    Raises:
        NotEnoughError: if there could never be enough for a run that begins, or not even for the fewest workers.
    """
    try:
        check_need(need, total, nodes, where)
    except NotEnoughError as error:
        if not begun:
            raise
        check_need(replace(need, count=need.fewest), total, nodes, where, "the fewest that train")
        return str(error)
    return ""


def check_need(
    need: Need,
    total: Mapping[str, float],
    nodes: Sequence[Mapping[str, float]] | None,
    where: str,
    which: str = "spares included",
) -> None:
    """Raises NotEnoughError for the first resource of which there could never be enough, or if it is too scattered.

    Args:
        nodes: what each node has; None where that is not known, as of nodes that an autoscaler would bring.
        which: workers these are.
    """
    who = f"{need.count} workers ({which}) need"
    for name in sorted(need.each):
        asked = need.total(name)
        if asked > total.get(name, 0.0):
            have = ", ".join(f"{_number(v)} {k}" for k, v in sorted(total.items()) if not _internal(k)) or "nothing"
            raise NotEnoughError(f"{who} {_number(asked)} {name}, but {where} has at most {have}")
    places = need.count if nodes is None else sum(need.fits(node) for node in nodes)
    if places < need.count:
        each = ", ".join(f"{_number(amount)} {name}" for name, amount in sorted(need.each.items()))
        raise NotEnoughError(f"{who} {each} each on one node, but the nodes of {where} have room for {places}")


def _times(there: float, amount: float, whole: bool) -> float:
    """How often an amount fits in. Of `whole` devices each has room for parts, or several are taken, as Ray does."""
    if amount <= 0:
        return math.inf
    if whole and amount < 1:
        return int(there) * math.floor(round(1 / amount, GRAIN))
    return math.floor(round(there / amount, GRAIN))


def _capacity() -> tuple[dict[str, float], list[dict[str, float]] | None]:
    """Of each resource the most that the cluster has or could get; and what each node has, if there come no others."""
    nodes = _nodes()
    capacity = {name: sum(node.get(name, 0.0) for node in nodes) for node in nodes for name in node}
    most = autoscaler_maximum()
    for name, amount in (most or {}).items():
        capacity[name] = max(capacity.get(name, 0.0), amount)
    return capacity, nodes if most is None else None


def _nodes() -> list[dict[str, float]]:
    """What each node has that is alive."""
    import ray

    alive = [node for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]
    return [{name: float(amount) for name, amount in node["Resources"].items()} for node in alive]


def remove_leftovers(temporary: Path) -> None:
    """Removes the folders of local Rays of this user whose process was killed, for certain; of some at a time."""
    me = Holder.this("")
    dead = (path for path in temporary.glob(f"{PREFIX}*") if _owner_is_dead(path, me))
    for path in islice(dead, MOST_LEFTOVERS):
        shutil.rmtree(path, ignore_errors=True)


def _owner_is_dead(path: Path, me: Holder) -> bool:
    try:
        if path.lstat().st_uid != os.getuid():
            return False
        owner: Holder = load(parse_json((path / OWNER).read_text()), Holder)
    except (OSError, ValueError, CodecError):
        return False  # it is just being made, or nothing of ours
    return owner.is_dead(me)


def _internal(resource: str) -> bool:
    return resource.startswith(("node:", "object_store", "memory", "accelerator_type"))


def _number(value: float) -> str:
    return f"{value:g}"


def _local_gpus() -> float:
    import torch

    return float(torch.cuda.device_count())


def _answers(address: str) -> bool:
    """Whether a gRPC server listens there, as a cluster's GCS is one. Ray would try a Redis, or whatever, for minutes.

    It begins with its settings, like every server of HTTP/2 (RFC 9113, 3.4). Under TLS it is enough that it listens.
    """
    host, _, port = address.rpartition(":")
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=ANSWER_S) as connection:
            if os.environ.get("RAY_USE_TLS", "0").lower() in ("1", "true"):
                return True
            connection.sendall(HTTP2)
            frame = connection.recv(HTTP2_HEADER, socket.MSG_WAITALL)
            return len(frame) == HTTP2_HEADER and frame[3] == HTTP2_SETTINGS
    except (OSError, ValueError):
        return False


def _short_temp() -> str:
    folder = tempfile.gettempdir()
    return folder if len(folder) <= SOCKET_PATH_LIMIT else "/tmp"
