"""The driver's side of a run: it follows the controller, shows what happens, and passes on requests to stop.

It decides nothing: a run goes on without it. Exit statuses are those of design, section 10.
"""

import queue
import signal
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import ray

from evenkeel.config import ConfigError
from evenkeel.control import messages as m
from evenkeel.runtime.calls import RETRY_S, ActorAway, ActorDead, insist, reply
from evenkeel.runtime.compat import actor_id, dead_process, drop_note, leave_note, read_note
from evenkeel.runtime.controller_actor import STOP, TROUBLE, ControllerActor, News
from evenkeel.runtime.names import NAMESPACE, controller_name, worker_of
from evenkeel.runtime.signals import StopRequests
from evenkeel.runtime.spec import RunSpec

Show = Callable[[Sequence[tuple[str, dict[str, Any]]]], None]
"""Takes pairs of "metrics", "event" or "status", and the line as it stands in the run directory; or of "note" and a
"text" that does not stand there."""

Heard = News | int | Exception
"""From the thread that follows the controller, also what ended it; the number of a signal."""

MAX_IDLE_LIVES = 10
"""Of the controller, after one another without a step in between, before the run is given up."""
IDLE_LIVES = (
    "the controller died again and again without a step in between; where memory is full, Ray ends it before others"
)
POLL_S = 0.5
"""Between two calls for news: a call costs both processes about as much as a report of the leader does."""
LOOK_S = 2.0
"""Between two looks whether the local Ray lives, where there is no news."""


class RayDiedError(Exception):
    """A process of the local Ray was killed; with it goes the run, and whoever asks Ray for anything may wait long."""


class InterruptedTwiceError(Exception):
    """A second Ctrl-C: everything was ended at once."""


def find_controller(run: str) -> Any | None:
    """The live controller of a run in this cluster, if there is one."""
    with suppress(ValueError):
        return ray.get_actor(controller_name(run), NAMESPACE)
    return None


def check_folder(controller: Any, url: str) -> None:
    """Raises ConfigError if the controller runs a run of the same name elsewhere; one that is just dead runs none."""
    with suppress(ActorDead):
        other = insist(controller.folder.remote)
        if other != url:
            raise ConfigError(f"a run of this name is running in {other}; choose another run.name", "run.name")


def start_controller(spec: RunSpec) -> Any:
    """Starts the controller of a run, which goes on whatever becomes of this process; or finds it, if it is there."""
    actor = ray.remote(ControllerActor).options(
        name=controller_name(spec.name),
        namespace=NAMESPACE,
        lifetime="detached",
        get_if_exists=True,
        max_restarts=-1,
        num_cpus=0,
        runtime_env={"env_vars": dict(spec.worker.env_vars)} if spec.worker.env_vars else None,
    )
    return actor.remote(spec)


def has_ended(controller: Any) -> bool:
    """Whether its run is over, though it may still be telling its followers."""
    try:
        return bool(insist(controller.ended.remote))
    except ActorDead:
        return True


def attend(run: str, controller: Any, requests: StopRequests, show: Show) -> m.End:
    """Follows the run to its end and leaves nothing of it in the cluster.

    SIGTERM or Ctrl-C asks the run to stop, which it does after a step.

    Raises:
        InterruptedTwiceError: at the second Ctrl-C, after every actor of the run was killed.
        RayDiedError: the local Ray was killed.
    """
    inbox: queue.SimpleQueue[Heard] = queue.SimpleQueue()
    requests.pass_on(inbox.put)
    over = threading.Event()
    threading.Thread(target=_follow, args=(controller, inbox, over), name="follow", daemon=True).start()
    try:
        end = _listen(run, controller, inbox, show)
    finally:
        over.set()
    drop_note(actor_id(controller), STOP)
    remove(controller)
    return end


class _Stop:
    """A request to stop, which is made again until the run has ended: it is lost with a controller that dies."""

    def __init__(self, controller: Any) -> None:
        self._controller = controller
        self._reason = ""
        self._call: Any = None
        self._epoch = 0

    def ask(self, number: int) -> None:
        self._reason = signal.Signals(number).name
        leave_note(actor_id(self._controller), STOP, self._reason)
        self._call = self._controller.hear.remote(m.StopRequested(self._reason))

    @property
    def asked(self) -> bool:
        return bool(self._reason)

    def repeat(self, epoch: int) -> None:
        """After news from this epoch of the controller."""
        if self._reason and (epoch != self._epoch or self._failed()):
            self._call = self._controller.hear.remote(m.StopRequested(self._reason))
        self._epoch = epoch

    def _failed(self) -> bool:
        done, _ = ray.wait([self._call], timeout=0)
        try:
            reply(done)
        except (ActorDead, ActorAway):
            return True
        return False


class _Trouble:
    """What holds the controller up, so that there is no news of it: each text once."""

    def __init__(self, controller: Any, show: Show) -> None:
        self._id, self._show = actor_id(controller), show
        self._told = ""

    def look(self) -> None:
        text = read_note(self._id, TROUBLE)
        if text and text != self._told:
            self._told = text
            self._show([("note", {"text": text})])


def _listen(run: str, controller: Any, inbox: "queue.SimpleQueue[Heard]", show: Show) -> m.End:
    stop, trouble = _Stop(controller), _Trouble(controller, show)
    at_a_step = 0  # the controller's epoch
    while True:
        match _next(inbox, trouble.look):
            case News(epoch, _, lines, end):
                show(lines)
                if end is not None:
                    return end
                if not at_a_step or any(kind == "metrics" for kind, _ in lines):
                    at_a_step = epoch
                elif epoch - at_a_step > MAX_IDLE_LIVES:
                    kill_actors(run)
                    return m.End("failed", IDLE_LIVES)
                stop.repeat(epoch)
            case ActorDead() as dead:
                _check_local_ray()
                if find_controller(run) is None:
                    kill_actors(run)
                return m.End("failed", f"the controller is dead: {dead}")
            case Exception() as defect:
                raise defect
            case int() as number:
                if stop.asked and number == signal.SIGINT:
                    kill_actors(run)
                    raise InterruptedTwiceError
                stop.ask(number)


def _next(inbox: "queue.SimpleQueue[Heard]", in_silence: Callable[[], None]) -> Heard:
    silent = False
    while True:
        _check_local_ray()
        if silent:
            in_silence()
        with suppress(queue.Empty):
            return inbox.get(timeout=LOOK_S)
        silent = True


def _check_local_ray() -> None:
    if dead := dead_process():
        raise RayDiedError(f"the local Ray has died ({dead})")


def _follow(controller: Any, inbox: "queue.SimpleQueue[Heard]", over: threading.Event) -> None:
    epoch, cursor = 0, 0
    try:
        while not over.is_set():  # a call after ray.shutdown() would start another Ray
            try:
                news = reply(controller.follow.remote(epoch, cursor))
            except ActorAway:
                over.wait(RETRY_S)
                continue
            inbox.put(news)
            if news.end is not None:
                return
            epoch, cursor = news.epoch, news.cursor
            over.wait(POLL_S)
    except Exception as error:  # the border of the thread: the other one waits for what comes from here
        inbox.put(error)


def remove(controller: Any) -> None:
    """Ends the controller of an ended run, and waits until its process is gone."""
    with suppress(ActorDead, ActorAway):
        reply(controller.release.remote())
        while True:
            reply(controller.follow.remote(0, 0))


def kill_actors(run: str) -> None:
    """Ends every actor of the run at once: the controller first, so that it starts no others."""
    names = [e["name"] for e in ray.util.list_named_actors(all_namespaces=True) if e["namespace"] == NAMESPACE]
    ours = [n for n in names if n == controller_name(run)] + [n for n in names if worker_of(run, n) is not None]
    for name in ours:
        with suppress(ValueError):
            ray.kill(ray.get_actor(name, NAMESPACE))
