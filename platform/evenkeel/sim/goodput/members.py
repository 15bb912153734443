"""What the members of a world answer, when they are asked to stop, to settle, or where they are."""

from collections.abc import Callable, Sequence
from dataclasses import replace

from evenkeel.control import messages as m
from evenkeel.core.ids import WorkerId
from evenkeel.core.world import World
from evenkeel.sim.clock import Clock
from evenkeel.sim.goodput.costs import Costs
from evenkeel.sim.goodput.fleet import Fleet, Hear
from evenkeel.sim.goodput.holdings import Holdings

PARKED, REGROUP, REDUCE = (m.PHASES.index(phase) for phase in ("parked", "regroup", "reduce"))


class Members:
    """Those of the last world that are alive: all are at the same place, and answer at the same time."""

    def __init__(self, clock: Clock, fleet: Fleet, holdings: Holdings, costs: Costs, hear: Hear) -> None:
        self._clock = clock
        self._fleet = fleet
        self._holdings = holdings
        self._costs = costs
        self._hear = hear
        self._members: Sequence[WorkerId] = ()
        self._position = m.Position()
        self._asked: m.Abort | m.Settle | None = None

    def enter(self, world: World) -> None:
        """They begin to join this world."""
        self._members = world.layout.members
        self._position = m.Position(world.generation, world.base.step, REGROUP)

    def wait(self, step: int) -> None:
        """They cannot go on with this step, as somebody is missing in it."""
        self._position = m.Position(self._position.generation, step, REDUCE, waiting=True)

    def park(self, step: int | None = None) -> None:
        """They have left the world, after this step if it is given, else where they are."""
        at = self._position
        self._position = m.Position(at.generation, at.step if step is None else step, PARKED)

    def promise(self, command: m.Abort, not_before: float) -> None:
        """All were told to stop: they answer once they have."""
        self._ask(command, max(self._clock.now + self._costs.abort_s, not_before), lambda: self._answer(command))

    def settle(self, command: m.Settle) -> None:
        """All were told the decision: they say so once they have carried it out."""
        self._ask(command, self._clock.now + self._costs.settle_s, lambda: self._settled(command))

    def locate(self, workers: Sequence[WorkerId], probe: int) -> None:
        """These are asked where they are, and say so at once, from a thread that does nothing else."""
        self._clock.after(0.0, lambda: self._located(workers, probe))

    def _ask(self, command: m.Abort | m.Settle, at: float, answer: Callable[[], None]) -> None:
        """The first of the commands that go to all stands for all of them, and for those that repeat it."""
        asked = self._asked
        if type(asked) is type(command) and asked is not None and asked.ask == command.ask:
            return
        self._asked = command

        def due() -> None:
            if self._asked is command:
                answer()

        self._clock.at(at, due)

    def _answer(self, command: m.Abort) -> None:
        answers: dict[int, m.Answer] = {}
        events: list[m.Event] = []
        for worker, held in self._held().items():
            if id(held) not in answers:
                answers[id(held)] = m.Answer(self._position, held)
            events.append(m.Answered(worker, command.generation, command.ask, answers[id(held)]))
        self._hear(events)

    def _settled(self, command: m.Settle) -> None:
        generation = command.decision.generation
        self._hear([m.Settled(worker, generation, command.ask, held) for worker, held in self._held().items()])

    def _held(self) -> dict[WorkerId, tuple[m.Held, ...]]:
        alive = self._fleet.alive
        return self._holdings.of([worker for worker in self._members if worker in alive], self._clock.now)

    def _located(self, workers: Sequence[WorkerId], probe: int) -> None:
        moves = int(10 * self._clock.now) if self._position.phase == REGROUP else 0
        position = replace(self._position, collective=moves)
        self._hear([m.Located(worker, probe, position) for worker in workers if worker in self._fleet.alive])
