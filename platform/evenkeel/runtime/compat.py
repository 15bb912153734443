"""Ray's private parts that the shell cannot do without. Each was checked on Ray 2.60.0."""

import os
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

_NOTES = "evenkeel"


def silence_ray() -> None:
    """Keeps raylet's messages (such as "A worker died") off the user's terminal; the run tells of it itself.

    Ray 2.60: `log_to_driver=False` stops the workers' lines only; errors go through this function of its module.
    """
    import ray._private.worker as module

    def ignore(data: Any, ignore_prefix: bool) -> None:
        pass

    module.print_to_stdstream = ignore


def reread_environment() -> None:
    """Lets Ray see a change of RAY_AUTH_MODE in a process that had imported it before.

    Ray 2.60: its configuration reads the environment once, at import; ray.init() itself refreshes it in this way.
    """
    from ray._raylet import Config  # type: ignore[attr-defined]

    Config.initialize("")


@contextmanager
def sigterm_kept() -> Iterator[None]:
    """Holds SIGTERM back while ray.init() sets handlers of its own for it, and puts the one that was there back.

    Ray 2.60: one in Python, which exits with 15, and one of C++, which prints a stack and aborts.
    """
    before = signal.getsignal(signal.SIGTERM)
    held = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, before)
        signal.pthread_sigmask(signal.SIG_SETMASK, held)


@contextmanager
def own_sessions() -> Iterator[None]:
    """Starts the processes of a local Ray in sessions of their own, out of reach of signals to our process group.

    `timeout`, supervisors and terminals signal the whole group: the run is to stop then, which it needs its Ray for.
    Ray 2.60: blocks only SIGINT in them. They still die with this process, by the kernel (PR_SET_PDEATHSIG).
    """
    import ray._private.services as module

    def start(*arguments: Any, preexec_fn: Callable[[], None], **options: Any) -> "subprocess.Popen[bytes]":
        def prepare() -> None:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})  # see sigterm_kept
            preexec_fn()

        options |= {"preexec_fn": prepare, "start_new_session": True}
        return subprocess.Popen(*arguments, **options)

    original = module.ConsolePopen
    module.ConsolePopen = start  # type: ignore[assignment, misc]
    try:
        yield
    finally:
        module.ConsolePopen = original  # type: ignore[misc]


def end_log_monitor() -> None:
    """Ends the process that copies the lines of all workers to drivers, after ray.init() has started a local Ray.

    Ray 2.60: with `log_to_driver=False` nobody takes them, but it looks at every log file ten times a second.
    """
    from ray._private.worker import _global_node

    assert _global_node is not None
    _global_node.kill_log_monitor(check_alive=False)


def dead_process() -> str | None:
    """Which process of the local Ray that this process has started is dead; None if all live, or there is none.

    Ray 2.60: nothing tells; after 60 s without its GCS it ends this process with status 1.
    """
    from ray._private.worker import _global_node

    assert _global_node is not None
    return next((kind for kind, _ in _global_node.dead_processes()), None)


def started_cluster() -> str | None:
    """The address that `ray start` left on this machine, "host:port"; None if it left none.

    Ray 2.60: `ray.init()` reads the same file; asked for "auto" it would also connect to other users' embedded Rays.
    Read without Ray, because what Ray's import reads of the environment depends on the answer.
    """
    file = Path(os.environ.get("RAY_TMPDIR", "/tmp")) / "ray" / "ray_current_cluster"
    try:
        return file.read_text().strip() or None
    except OSError:
        return None


def autoscaler_maximum() -> dict[str, float] | None:
    """The most of each resource that the cluster's autoscaler could bring; None without an autoscaler.

    Ray 2.60: `ray.cluster_resources()` only knows the nodes that are here now.
    """
    from ray._private.state import state

    most = state.get_max_resources_from_cluster_config()
    return None if most is None else {name: float(value) for name, value in most.items()}


def cluster_id() -> str:
    """What tells this Ray cluster from every other. Only in a process of Ray.

    Ray 2.60: made by its GCS at its first start; with GCS fault tolerance it stays through restarts.
    """
    from ray._private.worker import _global_node

    assert _global_node is not None
    return str(_global_node.cluster_id.hex())


def log_folder() -> Path:
    """Where this node's Ray keeps its log files. Only in a process of Ray."""
    from ray._private.worker import _global_node

    assert _global_node is not None
    return Path(_global_node.get_logs_dir_path())


def leave_note(actor_id: str, what: str, text: str) -> None:
    """Leaves a text about an actor in its cluster, where it is found although the actor is held up and hears no call.

    Ray 2.60: a key and a value in the GCS. A GCS that fails meanwhile ends all processes anyway.
    """
    from ray.exceptions import RayError
    from ray.experimental.internal_kv import _internal_kv_put

    with suppress(RayError):
        _internal_kv_put(f"{what}/{actor_id}", text, overwrite=True, namespace=_NOTES)


def read_note(actor_id: str, what: str) -> str:
    """The last text that was left; "" if there is none."""
    from ray.exceptions import RayError
    from ray.experimental.internal_kv import _internal_kv_get

    with suppress(RayError):
        return (_internal_kv_get(f"{what}/{actor_id}", namespace=_NOTES) or b"").decode()
    return ""


def drop_note(actor_id: str, what: str) -> None:
    from ray.exceptions import RayError
    from ray.experimental.internal_kv import _internal_kv_del

    with suppress(RayError):
        _internal_kv_del(f"{what}/{actor_id}", namespace=_NOTES)


def actor_id(handle: Any) -> str:
    """As the actor's own runtime context has it. Ray 2.60: nothing public tells it of a handle."""
    return str(handle._actor_id.hex())


def gcs_process() -> int | None:
    """The process that restarts this cluster's actors; None if it is not on this host. Only in a process of Ray.

    Ray 2.60: nothing names it, but its command line has the name of the session, which no other Ray has.
    """
    from ray._private.worker import _global_node

    assert _global_node is not None
    session = f"--session-name={_global_node.session_name}".encode()
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):  # it has just ended
            words = path.read_bytes().split(b"\0")
            if words[0].endswith(b"/gcs_server") and session in words:
                return int(path.parent.name)
    return None
