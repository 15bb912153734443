"""Names of a run's actors. The namespace is fixed, so that there is one controller of a run in a cluster (rule 10)."""

from evenkeel.core.ids import WorkerId

NAMESPACE = "evenkeel"
_DIGITS = 4


def controller_name(run: str) -> str:
    return f"{run}/controller"


def worker_name(run: str, worker_id: WorkerId) -> str:
    return f"{run}/{worker_id}"


def worker_of(run: str, actor_name: str) -> WorkerId | None:
    """The worker that an actor's name belongs to; None if it is not a worker of this run."""
    prefix, _, last = actor_name.rpartition("/")
    return WorkerId(last) if prefix == run and number_of(last) is not None else None


def worker_id(number: int) -> WorkerId:
    """The id of the `number`-th worker that a run starts, counted from 1."""
    return WorkerId(f"w{number:0{_DIGITS}d}")


def number_of(name: str) -> int | None:
    """The inverse of worker_id; None for any other word."""
    return int(name[1:]) if name[:1] == "w" and name[1:].isdecimal() else None
