"""Calls of actors' methods: what Ray raises for them becomes ActorDead or ActorAway, or is what the method raised.

Ray 2.60 has many errors for an actor that is dead for good. By the cause of its death: ActorDiedError, and beside it,
no RayActorErrors at all, OutOfMemoryError (its process was ended by Ray's memory monitor), RuntimeEnvSetupError and
ActorUnschedulableError (it never lived). Only ActorUnavailableError leaves it open: the process is being restarted, or
a connection broke. What the method itself raised is a RayTaskError, and stays one.
"""

import asyncio
import threading
from collections.abc import Awaitable, Callable
from typing import Any

import ray
from ray.exceptions import (
    ActorUnavailableError,
    ActorUnschedulableError,
    OutOfMemoryError,
    RayActorError,
    RayError,
    RayTaskError,
    RuntimeEnvSetupError,
)

RETRY_S = 0.2


class ActorDead(Exception):  # noqa: N818 - it says how things are
    """For good. Says why in a few words, such as "its process died"."""


class NodeDead(ActorDead):
    """With its whole node."""


class ActorAway(Exception):  # noqa: N818 - it says how things are
    """This call may have been heard or not; a later one may be answered."""


def reply(call: Any) -> Any:
    """What a call that was made returns.

    Raises:
        ActorDead, ActorAway: there is no reply.
        RayTaskError: the method raised.
    """
    try:
        return ray.get(call)
    except RayError as error:
        raise _meaning(error) from error


def insist(method: Callable[[], Any]) -> Any:
    """The reply, like `reply`; while the actor is away, it is called again."""
    while True:
        try:
            return reply(method())
        except ActorAway:
            threading.Event().wait(RETRY_S)


async def awaited(call: Awaitable[Any]) -> Any:
    """Like `reply`, on an event loop."""
    try:
        return await call
    except RayError as error:
        raise _meaning(error) from error


async def insist_awaited(method: Callable[[], Awaitable[Any]]) -> Any:
    """Like `insist`, on an event loop."""
    while True:
        try:
            return await awaited(method())
        except ActorAway:
            await asyncio.sleep(RETRY_S)


def last_line(error: BaseException) -> str:
    """Where Ray puts what is the matter: the lines before are a remote traceback."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__


def _meaning(error: RayError) -> Exception:
    match error:
        case RayTaskError():  # first: it is also an instance of the class that the method raised, which may be Ray's
            return error
        case ActorUnavailableError():
            return ActorAway(last_line(error))
        case OutOfMemoryError():
            return ActorDead("out of memory: Ray ended its process, because its node has hardly any left")
        case RuntimeEnvSetupError():
            return ActorDead(f"its runtime environment could not be set up: {last_line(error)}")
        case ActorUnschedulableError():
            return ActorDead(f"Ray cannot place it: {last_line(error)}")
        case RayActorError(actor_init_failed=True):
            return ActorDead(f"it could not begin: {last_line(error)}")
        case _:
            return NodeDead("its node died") if "its node" in str(error) else ActorDead("its process died")
