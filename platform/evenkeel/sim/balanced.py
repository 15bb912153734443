"""What must hold of runs that share work out by measured speed."""

from typing import TYPE_CHECKING

from evenkeel.control.balancing import CAUSE, JUDGED
from evenkeel.core.ids import WorkerId
from evenkeel.core.vote import Vote
from evenkeel.core.world import World
from evenkeel.plan.speeds import Speeds
from evenkeel.sim.pace import true_speeds
from evenkeel.sim.violation import require

if TYPE_CHECKING:
    from evenkeel.sim.fleet import Fleet

STEPS = 30
"""Of a generation after which work must be where it is done fastest, as far as that is worth a pause."""
WORTH = 0.7
"""Of the time that a step takes: if shares alone made less of it, they must have been changed by then."""


class BalanceChecks:
    """Watches the layouts of one run against the workers' true speeds, where nothing slows them for a time only."""

    def __init__(self, fleet: "Fleet") -> None:
        self._fleet = fleet
        scenario = fleet.scenario
        lasting = not any(fault.kind in ("slow", "hang") for fault in scenario.faults)
        self._watched = scenario.policy.rebalance and lasting
        self._heard = scenario.calm and not scenario.late_reports
        self._steps = 0
        self._evicted: set[WorkerId] = set()
        self._worlds: tuple[World | None, World] | None = None

    def opened(self, world: World, before: World | None) -> None:
        """Who was evicted does not come back at once."""
        back = self._evicted & set(world.layout.members)
        soon = world.cause in ("pause", CAUSE) and self._steps < JUDGED
        require(
            not (back and soon), f"{back} were evicted from generation {world.generation - 1}, but come back at once"
        )
        self._steps, self._evicted = 0, set()
        self._worlds = before, world

    def rebalanced(self) -> None:
        """The newest world has the layout that was wanted: it is faster, and leaves no state to one worker for that."""
        assert self._worlds is not None
        before, world = self._worlds
        assert before is not None
        self._evicted = set(before.layout.members) - set(world.layout.members)
        self._fleet.seen["evicted"] += bool(self._evicted)
        was, now = _kept(before), _kept(world)
        require(now >= min(2, was), f"generation {world.generation} keeps the state {now} times instead of {was}")
        if not self._watched or set(world.layout.members) != set(before.layout.members):
            return
        speeds = self._true(world)
        was_s, now_s = speeds.finish_s(before.layout), speeds.finish_s(world.layout)
        what = f"generation {world.generation} was to be faster"
        require(now_s < was_s, f"{what}: {now_s:.3f} s of passes instead of {was_s:.3f}")

    def visible(self, vote: Vote, world: World) -> None:
        """After enough steps no other shares would make a much faster step."""
        self._steps += 1
        if not self._watched or not self._heard or self._steps < STEPS or vote.generation != world.generation:
            return
        speeds = self._true(world)
        is_s, could_be_s = speeds.finish_s(world.layout), speeds.finish_s(speeds.shared(world.layout))
        what = f"step {vote.step}, {self._steps} of generation {world.generation}, takes {is_s:.3f} s of passes"
        require(could_be_s > WORTH * is_s, f"{what}; with other shares it would take {could_be_s:.3f}")

    def _true(self, world: World) -> Speeds:
        return true_speeds(self._fleet.workers[world.layout.members[0]], world.layout)


def _kept(world: World) -> int:
    """How many workers keep each part of the state."""
    return min(world.copies or len(world.layout.pipelines), len(world.layout.pipelines))
