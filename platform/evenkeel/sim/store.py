"""A simulated store of checkpoints, and the thread of each worker that writes to it. What can fail, fails."""

from collections.abc import Mapping
from dataclasses import dataclass
from random import Random
from typing import TYPE_CHECKING

from evenkeel.control import messages as m
from evenkeel.core.boxes import Box
from evenkeel.core.ids import Version, WorkerId
from evenkeel.core.model import ModelShape, Shard
from evenkeel.core.world import World
from evenkeel.plan.copies import shards_in
from evenkeel.plan.state import Slice, slices
from evenkeel.sim.memory import TORN, History, join
from evenkeel.sim.scenario import Storage

if TYPE_CHECKING:
    from evenkeel.sim.fleet import Fleet
    from evenkeel.sim.worker import SimWorker

LOST_S = 200.0
"""That something takes at the worst: longer than anybody waits for it."""


def part_name(version: Version, worker_id: WorkerId) -> str:
    return f"step-{version.step}/g{version.generation}-{worker_id}"


def written(shards: Mapping[WorkerId, Shard], model: ModelShape, worker_id: WorkerId) -> tuple[Slice, ...]:
    """What a worker writes of its shard: the slices that no member of a lower rank has too.

    Shards are cut at parameters here: one takes up less than the alignment of the parts.
    """
    others: set[Slice] = set()
    for member, shard in shards.items():
        if member == worker_id:
            break
        others.update(slices(model, shard))
    return tuple(s for s in slices(model, shards[worker_id]) if s not in others)


class Store:
    """Checkpoints of one run, and how the controller's shell writes their manifests.

    Args:
        rng: a source of its own, so that checkpoints leave the rest of a seed as it was.

    Attributes:
        files: the contents of every part that was ever written, by its name.
        manifests: by step, as each has one folder: the version and the names of its parts.
        damaged: versions that are listed, but cannot be read.
        reads: workers that have come to read; False for those that cannot read what is whole.
        open: manifests that are being written by this life of the controller.
    """

    def __init__(self, fleet: "Fleet", rng: Random, storage: Storage) -> None:
        self.fleet = fleet
        self.rng = rng
        self.storage = storage
        self.files: dict[str, Mapping[Slice, History]] = {}
        self.manifests: dict[int, tuple[Version, tuple[str, ...]]] = {}
        self.damaged: set[Version] = set()
        self.reads: dict[WorkerId, bool] = {}
        self.eyes = Random(f"{fleet.scenario.seed} eyes")
        self.open: list[m.CommitCheckpoint] = []

    def listed(self) -> tuple[Version, ...]:
        """What a new life of the controller finds, oldest step first."""
        return tuple(version for _, (version, _) in sorted(self.manifests.items()))

    def read(self, worker: "SimWorker", version: Version, wanted: tuple[Slice, ...]) -> dict[Slice, History] | None:
        """The slices of a version from its checkpoint; None if that is damaged or missing, or is so to this worker."""
        there, names = self.manifests.get(version.step, (None, ()))
        if there != version or version in self.damaged:
            return None
        if not self.reads.setdefault(worker.info.worker_id, self.eyes.random() >= self.storage.misreads):
            self.fleet.seen["misread"] += 1
            return None
        pieces: dict[str, list[tuple[Box, History]]] = {}
        for name in names:
            for piece, history in self.files[name].items():
                pieces.setdefault(piece.tensor, []).append((piece.box, history))
        return {want: join(want, pieces.get(want.tensor, [])) for want in wanted}

    def seconds(self, usual: float) -> float:
        """How long something takes this time."""
        if self.rng.random() < self.storage.slow:
            return LOST_S if self.rng.random() < 0.1 else self.rng.uniform(1.0, 10.0)
        return usual * self.rng.uniform(0.5, 2.0)

    def damaged_file(self, version: Version) -> str:
        """What whoever reads it finds to be damaged; to others it is as if it were not there."""
        return "a part" if version in self.damaged else ""

    # ------------------------------------------------------------ what the controller's shell does

    def carry_out(self, command: m.CommitCheckpoint | m.LookAt) -> None:
        """In the background; the controller hears of it if it lives as long."""
        if isinstance(command, m.LookAt):
            life = self.fleet.life
            self.fleet.clock.after(self.eyes.uniform(0.01, 0.3), lambda: self._look(command, life))
            return
        self.open.append(command)
        self.fleet.clock.after(self.seconds(self.storage.commit_s), lambda: self._done(command))

    def controller_died(self) -> None:
        """What it was writing may be there or not, and nobody hears of it."""
        for command in self.open:
            if self.rng.random() < 0.5:
                self._put(command)
        self.open.clear()

    def _look(self, command: m.LookAt, life: int) -> None:
        if life != self.fleet.life or self.fleet.controller is None:
            return
        version = command.version
        there, _ = self.manifests.get(version.step, (None, ()))
        whole = there == version and (not command.file or version not in self.damaged)
        self.fleet.hear(m.Looked(version, command.file, "" if whole else "not what was written"))

    def _done(self, command: m.CommitCheckpoint) -> None:
        if command not in self.open:
            return
        self.open.remove(command)
        failed = self.rng.random() < self.storage.commit_fails
        there = (not failed or self.rng.random() < self.storage.arrives) and self._put(command)
        if failed or not there:
            self.fleet.hear(m.CheckpointFailed(command.version, "503 slow down"))
            self.fleet.moment_of_anybody("manifest refused")
            return
        self.fleet.moment_of_anybody("manifest written")
        removed = self._prune(command)
        self.fleet.hear(m.CheckpointCommitted(command.version, 1000, removed))

    def _put(self, command: m.CommitCheckpoint) -> bool:
        """False if a later generation has committed this step: the run went back and has redone it."""
        version = command.version
        there = self.manifests.get(version.step)
        if there is not None and there[0].generation > version.generation:
            return False
        self.fleet.checks.saved.manifest(command)
        self.manifests[version.step] = (version, command.parts)
        if self.rng.random() < self.storage.damaged:
            self.damaged.add(version)
        return True

    def _prune(self, command: m.CommitCheckpoint) -> tuple[int, ...]:
        """As the real store does: steps after the newest checkpoint's are of before the run went back."""
        line = {command.version, *command.line}
        newest_first = sorted(self.listed(), key=lambda v: (v.generation, v.step), reverse=True)
        newest = newest_first[0]
        kept = [v for v in newest_first if v == newest or (v in line and v.step <= newest.step)]
        kept = [v for n, v in enumerate(kept) if n < self.storage.keep or v == command.agreed]
        removed = [v for v in newest_first if v not in kept]
        for version in removed:
            del self.manifests[version.step]
        self.fleet.checks.saved.prunes(removed)
        return tuple(version.step for version in removed)


@dataclass
class Snapshot:
    """A worker's host buffer: its part of one version."""

    version: Version
    contents: dict[Slice, History]


class Writer:
    """The background thread of a worker that writes its part of a checkpoint. It outlives a world, not its process."""

    def __init__(self, worker: "SimWorker") -> None:
        self.worker = worker
        self.snapshot: Snapshot | None = None
        self.next: Snapshot | None = None
        self.told: m.Event | None = None

    @property
    def busy(self) -> bool:
        return self.snapshot is not None

    def take(self, version: Version, world: World, last: bool) -> None:
        """Copies its part of the committed version to the buffer. If that is still being written, both are torn.

        Only the last step's can wait for that, as nothing changes its state any more.
        """
        memory, me = self.worker.memory, self.worker.info.worker_id
        shards = shards_in(world, memory.model)
        contents = {s: memory.shards[shards[me]][s] for s in written(shards, memory.model, me)}
        snapshot = Snapshot(version, contents)
        if self.snapshot is None:
            self._begin(snapshot)
        elif last:
            self.next = snapshot
        else:
            self.snapshot.contents = dict.fromkeys(self.snapshot.contents, TORN)
            self._begin(Snapshot(version, dict.fromkeys(contents, TORN)))

    def _begin(self, snapshot: Snapshot) -> None:
        self.snapshot = snapshot
        store = self.worker.fleet.store
        assert store is not None
        seconds = store.seconds(store.storage.write_s) * self.worker.slow
        self.worker.fleet.clock.after(seconds, lambda: self._write(store, snapshot))

    def _write(self, store: Store, snapshot: Snapshot) -> None:
        worker, fleet = self.worker, self.worker.fleet
        if not worker.alive:
            return
        if fleet.clock.now < worker.hung_until:
            fleet.clock.after(worker.hung_until - fleet.clock.now, lambda: self._write(store, snapshot))
            return
        me, name = worker.info.worker_id, part_name(snapshot.version, worker.info.worker_id)
        event: m.Event
        if store.rng.random() < store.storage.part_fails:
            event = m.PartFailed(me, snapshot.version, "connection refused")
        else:
            store.files[name] = snapshot.contents
            fleet.moment(worker, "part written")
            event = m.PartWritten(me, snapshot.version, name)
        if self.snapshot is snapshot:
            self.snapshot = None
            if self.next is not None:
                waiting, self.next = self.next, None
                self._begin(waiting)
        if worker.alive:
            self.told = event
            fleet.tell_of_part(worker, event)

    def tell_again(self) -> None:
        """What became of its last part, to a new life of the controller."""
        if self.told is not None:
            self.worker.fleet.tell_of_part(self.worker, self.told)
