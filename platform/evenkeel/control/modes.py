"""The modes of the controller; each carries just the data that is legal in it."""

from dataclasses import dataclass, field

from evenkeel.control.messages import Answer, Decision, Held
from evenkeel.core.ids import WorkerId
from evenkeel.core.world import World


@dataclass(frozen=True, slots=True)
class Gathering:
    """No generation runs. `since` the last new worker came; `waiting_for` says what is missing, "" if nothing known.

    `places_until`: so long others are waited for, as without them no layout has places for those who hold the state.
    """

    since: float
    waiting_for: str = ""
    places_until: float | None = None


@dataclass(frozen=True, slots=True)
class Forming:
    """`awaited` are the members that have not joined yet."""

    world: World
    awaited: set[WorkerId]


@dataclass(frozen=True, slots=True)
class Running:
    world: World


@dataclass(frozen=True, slots=True)
class Aborting:
    """Waiting for every survivor's promise (rule 1). `ask` tells this round's answers from an earlier one's; `awaited`
    are the survivors that have not answered it."""

    world: World
    ask: int
    since: float
    ran: bool
    """Whether the generation had begun to train."""
    awaited: set[WorkerId]
    answers: dict[WorkerId, Answer] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Settling:
    """The decision is written down and told; waiting until every survivor has carried it out."""

    world: World
    ask: int
    since: float
    decision: Decision
    awaited: set[WorkerId]
    """Survivors that have not carried it out."""
    done: dict[WorkerId, tuple[Held, ...]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Ended:
    status: str
    error: str = ""


Mode = Gathering | Forming | Running | Aborting | Settling | Ended
_WITH_WORLD = (Forming, Running, Aborting, Settling)


def world_of(mode: Mode) -> World | None:
    return mode.world if isinstance(mode, _WITH_WORLD) else None
