"""Mirrors: snapshots of the state in host memory, a worker's own and those that it keeps for others (plan/mirrors.py).

Only the copy into the worker's own snapshot holds up the training. A thread sends it to its keeper and receives those
of others at the same time, over connections of the generation: an abort breaks them too, and what is not whole by then
gets no label. Two versions take turns (control/member.py says when), so that a death in the middle never leaves none.
"""

import queue
import threading
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from evenkeel.core.ids import Version, WorkerId
from evenkeel.core.model import ModelShape, Shard
from evenkeel.core.world import World
from evenkeel.engine.faults import Faults
from evenkeel.engine.groups import GroupAborted, GroupBroken, GroupSet
from evenkeel.engine.seat import Seat
from evenkeel.engine.slices import OwnedSlices
from evenkeel.engine.state import ShardState
from evenkeel.engine.wire import Connection, exchange
from evenkeel.plan.copies import Copies
from evenkeel.plan.flat import ALIGNMENT, flat_places
from evenkeel.plan.mirrors import Mirroring, mirrors_of
from evenkeel.plan.state import KINDS


class MirrorError(Exception):
    """A mirror could not be sent or received, though no connection broke."""


class Snapshot(OwnedSlices):
    """The state of the owned ranges of a shard, in host memory: one flat buffer, kind by kind."""

    def __init__(self, model: ModelShape, shard: Shard, dtype: torch.dtype, pinned: bool) -> None:
        assert shard.owned is not None
        super().__init__(shard, flat_places(model, shard, ALIGNMENT), shard.owned)
        # Written to once, so that its pages are there when the training waits for the copy.
        self.flat = torch.zeros(len(KINDS) * self.size, dtype=dtype, pin_memory=pinned)

    def range(self, kind: str, start: int, stop: int) -> Tensor:
        at = KINDS.index(kind) * self.size + self.offset(start, stop)
        return self.flat[at : at + stop - start]

    def take(self, state: ShardState) -> None:
        """Copies what it is of from the buffers that are trained. Waits for the device."""
        for kind in KINDS:
            for start, stop in self.owned:
                self.range(kind, start, stop).copy_(state.range(kind, start, stop), non_blocking=True)
        if state.params.device.type == "cuda":
            torch.cuda.synchronize(state.params.device)

    @property
    def payload(self) -> memoryview:
        """Its bytes, as they are sent."""
        array: Any = self.flat.view(torch.uint8).numpy()
        return memoryview(array)


@dataclass(frozen=True, slots=True)
class _Round:
    """One version on its way: this worker's own snapshot to its keeper, those of others to here."""

    version: Version
    groups: GroupSet
    mine: tuple[Snapshot, WorkerId] | None
    kept: tuple[tuple[Snapshot, WorkerId], ...]


@dataclass(frozen=True, slots=True)
class _Links:
    """The connections of one generation."""

    groups: GroupSet
    keeper: Connection | None
    owners: tuple[Connection, ...]


class Mirrors:
    """The snapshots in one worker's memory. Which are whole, and which may be written over, the Member knows."""

    def __init__(self, worker_id: WorkerId, model: ModelShape, seat: Seat, faults: Faults) -> None:
        self._id = worker_id
        self._model = model
        self._seat = seat
        self._faults = faults
        self._held: dict[Version, dict[Shard, Snapshot]] = {}
        self._mine: Mirroring | None = None
        self._kept: dict[WorkerId, Shard] = {}
        self._links: _Links | None = None
        self._rounds: queue.SimpleQueue[_Round | None] = queue.SimpleQueue()
        self._idle = threading.Event()
        self._idle.set()
        self._thread: threading.Thread | None = None
        self._failed: tuple[GroupSet, Exception] | None = None

    def begin(self, world: World, copies: Copies) -> None:
        """Finds out what this worker mirrors in a world, and whose mirrors it keeps."""
        plan = mirrors_of(world, self._model, copies)
        self._mine = plan.get(self._id)
        self._kept = {worker: x.shard for worker, x in plan.items() if x.keeper == self._id}

    def copy(self, version: Version, state: ShardState, groups: GroupSet) -> None:
        """Takes a snapshot of the state, which has this version now, and has it sent; from the training thread.

        Whether the mirror before it is whole was voted on, so no thread uses its buffers any more.
        """
        self.wait()
        self._faults.fire("mirror", version.step)
        shards = tuple(self._kept.values()) if self._mine is None else (self._mine.shard, *self._kept.values())
        with self._seat.changed:
            self._seat.member.begin_mirror(version, shards)
            alive = {x.version for x in self._seat.member.mirrors}
        # What is written over serves again, where it is of the same shard.
        freed = {s: x for v, held in self._held.items() if v not in alive for s, x in held.items()}
        self._held = {v: held for v, held in self._held.items() if v in alive}
        held = self._held.setdefault(version, {})
        for shard in shards:
            if shard not in held:  # if it is, the same bytes are written there again
                held[shard] = freed.pop(shard) if shard in freed else self._make(shard, state)
        mine = None
        if self._mine is not None:
            mine = held[self._mine.shard], self._mine.keeper
            mine[0].take(state)
            self._label(version, mine[0].shard)
        self._go(_Round(version, groups, mine, tuple((held[shard], worker) for worker, shard in self._kept.items())))

    def free(self) -> None:
        """Frees what the member has no mirror of any more; in a world that mirrors, the next one is written there.

        After the first vote of a world: until then others may need it (rule 13).
        """
        with self._seat.changed:
            alive = {x.version for x in self._seat.member.mirrors}
        self._held = {v: held for v, held in self._held.items() if v in alive}
        self._failed = None  # of an earlier generation; its traceback would keep what it was about

    def of(self, version: Version) -> list[Snapshot]:
        """Those of a version that are whole."""
        with self._seat.changed:
            whole = [s for x in self._seat.member.mirrors if x.version == version for s in x.held]
        return [self._held[version][shard] for shard in whole]

    def wait(self) -> None:
        """Until nothing is sent or received any more; if the groups are aborted that is at once."""
        self._idle.wait()

    def check(self, groups: GroupSet) -> None:
        """Raises what made a mirror over these groups fail; before each vote, in the training thread.

        As long as one is not whole nobody begins another, so this generation would have no more. The next one meets
        again and mirrors its base.

        Raises:
            GroupBroken: if a connection broke, which may be nobody's death.
            MirrorError: after anything else.
        """
        if self._failed is not None and self._failed[0] is groups:
            raise self._failed[1]

    def close(self) -> None:
        if self._thread is not None:
            self._rounds.put(None)
            self._thread.join()

    def _make(self, shard: Shard, state: ShardState) -> Snapshot:
        return Snapshot(self._model, shard, state.params.dtype, state.params.device.type == "cuda")

    def _label(self, version: Version, shard: Shard) -> None:
        with self._seat.changed:
            self._seat.member.mirrored(version, shard)

    # ------------------------------------------------------------ its thread

    def _go(self, task: _Round) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="mirror", daemon=True)
            self._thread.start()
        self._idle.clear()
        self._rounds.put(task)

    def _run(self) -> None:
        while self._carry_out_next():
            pass

    def _carry_out_next(self) -> bool:
        """False at the end. Keeps nothing of a round while it waits for the next, so that snapshots can be freed."""
        task = self._rounds.get()
        if task is None:
            return False
        try:
            self._carry_out(task)
        except GroupAborted:
            pass  # the generation is over
        except Exception as error:  # the border of the thread: the training thread raises it, see `check`
            self._failed = task.groups, _failure(task.version, error)
        finally:
            self._idle.set()
        return True

    def _carry_out(self, task: _Round) -> None:
        if self._links is None or self._links.groups is not task.groups:
            keeper = None if task.mine is None else task.groups.call("mirror", task.mine[1])
            owners = tuple(task.groups.claim("mirror", worker) for _, worker in task.kept)
            self._links = _Links(task.groups, keeper, owners)
        links = self._links
        sends = {} if task.mine is None or links.keeper is None else {links.keeper: task.mine[0].payload}
        self._faults.fire("exchange", task.version.step)
        exchange(sends, {c: snapshot.payload for c, (snapshot, _) in zip(links.owners, task.kept, strict=True)})
        self._faults.fire("mirrored", task.version.step)
        for snapshot, _ in task.kept:
            self._label(task.version, snapshot.shard)


def _failure(version: Version, error: Exception) -> Exception:
    """A broken connection stays one: a neighbour's death, or of the link, is not this worker's fault."""
    broken = isinstance(error, GroupBroken)
    what = f"mirror of step {version.step}: {error if broken else repr(error)}"
    failure: Exception = GroupBroken(what) if broken else MirrorError(what)
    failure.__cause__ = error
    return failure
