"""What is in a worker's memory from world to world, where nobody else is a source of it."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_saver import Saved
from tiny import layout_of
from torch import Tensor

from evenkeel.control.parts import Decision, Divergence
from evenkeel.core.ids import INITIAL, NodeId, Version, WorkerId
from evenkeel.core.layout import Layout, WorkerInfo
from evenkeel.core.model import Shard
from evenkeel.engine.collective import SoloGroup
from evenkeel.engine.holdings import Holdings
from evenkeel.engine.job import Piece
from evenkeel.engine.local import static_world
from evenkeel.engine.progress import Progress
from evenkeel.engine.seat import Seat
from evenkeel.engine.state import ShardState

A, B = WorkerId("a"), WorkerId("b")
INFOS = [WorkerInfo(w, NodeId("n"), 1) for w in (A, B)]
FIRST, SECOND = layout_of([A, B], [[0, 2, 4]], 1, [4]), layout_of([B, A], [[0, 2, 4]], 1, [4])
SIX = Version(6, 1)


class Joining:
    """Worker a, which joins worlds that all break before their first vote. There is a checkpoint of step 6."""

    def __init__(self, folder: Path) -> None:
        self.job = Saved(folder)(A)
        self.holdings = Holdings(self.job, torch.device("cpu"))
        self.seat = Seat(A)
        self.generation = 1
        self.whole = {INITIAL: self._state(), SIX: self._state()}
        torch.manual_seed(1)
        for kind in ("params", "exp_avg", "exp_avg_sq"):
            getattr(self.whole[SIX], kind).normal_()
        six = self.whole[SIX]
        assert self.job.save is not None
        self.job.save(SIX, A, [Piece(name, six.shape(name), box, view) for name, box, view in six.pieces()])

    def _state(self) -> ShardState:
        settings = self.job.settings
        state = ShardState(self.job.model, self.job.shape, Shard(0, 4, 0, 1), settings.precision)
        state.initialise(settings.seed)
        return state

    def join(self, layout: Layout, base: Version, divergence: Divergence | None = None) -> ShardState:
        """The shard of this world; it ends with a decision that says this of the copies."""
        self.generation += 1
        world = replace(static_world(INFOS, layout, 9), generation=self.generation, base=base, saved=base != INITIAL)
        member, progress = self.seat.member, Progress()
        assert member.form(1, world)
        progress.begin(world.generation, base.step, lambda: True)
        memory = self.holdings.reshard(world, A, self.seat, (), SoloGroup("world", A), progress)
        member.resharded(memory.state.shard, base)
        self.holdings.adopt(memory, member.trained)
        member.park()
        assert member.abort(1, world.generation, base.step)
        decision = Decision(world.generation, base, None, "", divergence)
        assert member.settle(1, decision).accepted
        return memory.state

    def expected(self, state: ShardState, version: Version) -> dict[str, Tensor]:
        whole = self.whole[version]
        return {name: whole.tensor(name)[box.slices] for name, box, _ in state.pieces()}


def same(state: ShardState, expected: dict[str, Tensor]) -> bool:
    return all(torch.equal(state.tensor(name), value) for name, value in expected.items())


@pytest.mark.parametrize("base", [INITIAL, SIX], ids=["initial", "saved"])
def test_a_shard_that_was_left_and_is_taken_up_again_is_whole(base: Version, tmp_path: Path) -> None:
    """It is still held beside the other, but in memory that is no longer the current one."""
    joining = Joining(tmp_path)
    shards = []
    for layout in (FIRST, SECOND, FIRST):
        state = joining.join(layout, base)
        assert same(state, joining.expected(state, base))
        shards.append(state.shard)
    assert shards[0] == shards[2] != shards[1]


@pytest.mark.parametrize("base", [INITIAL, SIX], ids=["initial", "saved"])
def test_what_is_held_is_not_read_over_what_it_is_compared_with(base: Version, tmp_path: Path) -> None:
    """Until it is known that copies differ and nobody knows which is right."""
    joining = Joining(tmp_path)
    state = joining.join(FIRST, base)
    joining.holdings.current.flip()
    doubtful = Divergence(base.step + 1, (), (), (A,))
    kept = joining.join(FIRST, base, doubtful)
    assert kept is state
    assert not same(kept, joining.expected(kept, base))
    again = joining.join(FIRST, base)
    assert same(again, joining.expected(again, base))
