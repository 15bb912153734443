"""What must hold of checkpoints, and of a run that goes back to one (design, sections 4, 7 and 9)."""

from itertools import combinations
from typing import TYPE_CHECKING

from evenkeel.control import messages as m
from evenkeel.core.ids import INITIAL, Version, WorkerId
from evenkeel.core.world import World
from evenkeel.plan.copies import shards_in
from evenkeel.plan.coverage import lost_slices
from evenkeel.plan.state import Slice, slices
from evenkeel.sim.memory import clean
from evenkeel.sim.store import part_name
from evenkeel.sim.violation import ViolationError, require

if TYPE_CHECKING:
    from evenkeel.sim.checks import Checks

MOST_UPLOADS = 4
"""At once in one life, where no word is lost or late: a manifest that is being written, parts that are all there and
wait for that, parts that are being written, and those of the last step, which wait for these."""


class SavedChecks:
    """Watches the store, and each Restored.

    Attributes:
        known: checkpoints that this life of the controller was told of, and has not found to be damaged or removed;
            unreadable: those that it has found to be damaged.
        refused: those of which it was told that their manifest could not be written.
        awaited: checkpoints, each with a file, at which this life of the controller is looking; told: who of the newest
            world could not read these; blind: those of them that could not read what is whole.
        asked: the version that the user asked this life to begin from, until that was done.
        removed: what retention has taken away.
        gone_back: each base that the run went back to: the versions that made it, with the generation up to which all
            others are gone.
        failed: steps of which a line of events says that their checkpoint was not written.
    """

    def __init__(self, checks: "Checks") -> None:
        self.checks = checks
        self.known: set[Version] = set()
        self.unreadable: set[Version] = set()
        self.refused: set[Version] = set()
        self.awaited: set[tuple[Version, str]] = set()
        self.told: set[tuple[Version, str, WorkerId]] = set()
        self.blind: set[WorkerId] = set()
        self.asked: Version | None = None
        self.removed: set[Version] = set()
        self.gone_back: list[tuple[frozenset[Version], int]] = []
        self.failed: set[int] = set()

    # ------------------------------------------------------------ what the controller hears

    def begins(self, saved: tuple[Version, ...], resume: Version | None) -> None:
        self.known = set(saved)
        self.unreadable = set()
        self.refused = set()
        self.awaited = set()
        self.told = set()
        self.blind = set()
        self.asked = resume

    def hears(self, event: m.Event) -> None:
        match event:
            case m.CheckpointCommitted(version, _, removed):
                self.known = {v for v in self.known | {version} if v.step not in removed}
            case m.CheckpointFailed(version):
                self.refused.add(version)
            case m.CheckpointUnreadable(worker, generation, version, _, file):
                if generation == max(self.checks.worlds) and version in self.known:
                    self.told.add((version, file, worker))
            case m.Looked(version, _, error) if error:
                self.awaited = {(v, file) for v, file in self.awaited if v != version}
                self.unreadable |= self.known & {version}
                self.known.discard(version)
            case m.Looked(version, file):
                self.awaited.discard((version, file))
                self.blind |= {who for v, f, who in self.told if (v, f) == (version, file)}
                self.checks.fleet.seen["found after all"] += version in self.refused - self.known
                self.known.add(version)
            case _:
                pass

    def is_gone(self, version: Version) -> bool:
        """Whether the run went back to before this version. By what every version was made of, not by its number."""
        return any(version.generation <= at and version not in line for line, at in self.gone_back)

    # ------------------------------------------------------------ the store

    def manifest(self, command: m.CommitCheckpoint) -> None:
        """A manifest becomes visible: all of one visible version is there, each slice once."""
        version, fleet = command.version, self.checks.fleet
        assert fleet.store is not None
        name = f"the checkpoint of {version}"
        require(version in self.checks.ever_shown, f"{name} is complete, but that never became visible")
        world = self.checks.worlds[version.generation]
        require(command.layout == world.layout, f"{name} has the layout {command.layout}")
        expected = sorted(part_name(version, w) for w in world.layout.members)
        require(sorted(command.parts) == expected, f"{name} consists of {command.parts}, not {expected}")
        contents: dict[Slice, int] = {}
        known = self.checks.histories[version]
        for part in command.parts:
            require(part in fleet.store.files, f"{name} is complete without {part}")
            for piece, history in fleet.store.files[part].items():
                contents[piece] = contents.get(piece, 0) + 1
                if clean(history) != known:  # so often that the text is made only where it is needed
                    raise ViolationError(f"{name}, {part}: {piece} is {history}, not {known}")
        model = fleet.scenario.policy.model
        wanted = {s for shard in shards_in(world, model).values() for s in slices(model, shard)}
        require(contents.keys() == wanted, f"{name} lacks {wanted - contents.keys()}")
        require(set(contents.values()) == {1}, f"{name} has a slice twice")

    def prunes(self, removed: list[Version]) -> None:
        """Retention has taken these away: not the last that the run could go back to."""
        assert self.checks.fleet.store is not None
        self.removed.update(removed)
        counted = {v for v in removed if not self.is_gone(v)}
        left = {v for v in self.checks.fleet.store.listed() if not self.is_gone(v)}
        require(bool(left) or not counted, f"{counted} was removed, and no checkpoint is left that counts")
        self.checks.fleet.seen["one checkpoint kept"] += self.checks.fleet.store.storage.keep == 1

    # ------------------------------------------------------------ what the controller writes down

    def restored(self, entry: m.Restored) -> None:
        """The run goes back no further than it must, or to where the user asked it to."""
        base, checks = entry.base, self.checks
        name = f"the run goes back to {base}"
        require(not self.is_gone(base), f"{name}, which is of a line that was given up")
        newest = max(checks.worlds, default=0)
        require(entry.at == newest, f"{name}, from generation {entry.at}, not {newest}")
        if self.asked is not None:
            require(base == self.asked, f"{name}, {self.asked} was asked for")
            checks.fleet.seen["asked back"] += 1
            self.asked = None
        else:
            self._must(name, base, entry.reason)
        step = base.step
        before = checks.shown[step - 1] if step else INITIAL
        require(before == base, f"{name}, of this step {before} was visible")
        self.gone_back.append((frozenset((INITIAL, *checks.shown[:step])), entry.at))
        del checks.shown[step:]
        checks.base = base

    def _must(self, name: str, base: Version, reason: str) -> None:
        """Nobody asked for it: so all newer states are lost."""
        checks = self.checks
        step = max(checks.base.step, len(checks.shown))
        mirrored, alone = "back to the mirrors" in reason, "nobody came" in reason
        lost = checks.is_lost(step) or checks.corruption.in_doubt
        require(lost or alone, f"{name} although all of step {step} is alive")
        usable = {v for v in self.known - checks.corruption.distrusted if not self.is_gone(v)}
        newer = {v for v in usable | self._arrived() if v.step > base.step}
        require(not newer, f"{name} although the store has {newer}")
        newer = {v for v in self.removed - checks.corruption.distrusted if not self.is_gone(v) and v.step > base.step}
        # Unless for one that is newer still, of which nobody knew that it cannot be read.
        newer = {v for v in newer if all(u.step <= v.step for u in self.unreadable)}
        require(not newer, f"{name} because {newer} was removed")
        if alone:
            self._no_layout(name)
        elif not checks.corruption.in_doubt:
            checks.mirrors.restored(name, base, mirrored)
        if mirrored:
            return
        if base == INITIAL:
            require(not self.unreadable, f"{name}: {self.unreadable} cannot be read, and is newer")
            checks.fleet.seen["back to the beginning"] += 1
            return
        assert checks.fleet.store is not None
        require(base in usable, f"{name}, of which it knows no checkpoint")
        require(base in checks.fleet.store.listed(), f"{name}, which is not in the store")
        checks.corruption.restored(base)

    def _arrived(self) -> set[Version]:
        """Checkpoints that are there, and could be gone back to, though their manifest was said not to be written."""
        store = self.checks.fleet.store
        there = self.refused.intersection(store.listed()) if store is not None else set()
        usable = there - self.unreadable - self.checks.corruption.distrusted
        return {v for v in usable if not self.is_gone(v)}

    def _no_layout(self, name: str) -> None:
        """However places are given out, those who have one do not hold all of the state, as they told."""
        checks = self.checks
        fleet, wish = checks.fleet, checks.fleet.scenario.policy.wish
        assert fleet.controller is not None and wish.tensor is not None
        alive = fleet.controller.roster.alive
        here = min(len(alive), wish.max_workers)
        wished = wish.data * wish.pipeline if wish.data and wish.pipeline else here
        groups = min(here // wish.tensor, wished)
        told = fleet.controller._state.holdings.items()
        held = {w: [h.shard for h in holdings if h.version == checks.base] for w, holdings in told if w in alive}
        for some in combinations(sorted(held), min(len(held), groups * wish.tensor)):
            lost = lost_slices(fleet.scenario.policy.model, [shard for w in some for shard in held[w]])
            require(bool(lost), f"{name} although {some} hold all of {checks.base}")
        fleet.seen["back as nobody came"] += 1

    def opened(self, world: World) -> None:
        self.told.clear()
        blind = self.blind & {info.worker_id for info in world.members}
        require(not blind, f"generation {world.generation} is opened with {blind}, which cannot read what is whole")
        require(not self.awaited, f"generation {world.generation} is opened before it is known what {self.awaited} is")
        if world.saved:
            require(world.base in self.known, f"generation {world.generation} begins from {world.base}: not saved")
            self.checks.fleet.seen["world from a checkpoint"] += 1

    # ------------------------------------------------------------ after every event, and at the end

    def bounded(self) -> None:
        """No heap of checkpoints that are never complete."""
        fleet = self.checks.fleet
        storage = fleet.scenario.storage
        if storage is None or fleet.controller is None:
            return
        uploads = len(fleet.controller._state.uploads)
        fleet.seen["most checkpoints at once"] = max(uploads, fleet.seen["most checkpoints at once"])
        told = (
            fleet.life == 1
            and fleet.scenario.calm
            and not (storage.told_late or storage.told_never or fleet.scenario.late_reports)
        )
        cut = any("cut" in w.struck for w in fleet.workers.values())
        require(uploads <= MOST_UPLOADS or cut or not told, f"{uploads} checkpoints are being written")

    def logged(self, command: m.Log) -> None:
        if command.event != "checkpoint_failed":
            return
        step, error = command.fields["checkpoint"], command.fields["error"]
        self.failed.add(step)
        storage = self.checks.fleet.scenario.storage
        assert storage is not None
        silent = storage.slow or storage.told_never or self._words_are_lost
        require(bool(silent) or "no progress" not in error, f"the checkpoint of step {step} was waited for in vain")

    def ended(self, status: str, error: str) -> None:
        """Whoever ends a run that has a store leaves its last step there, or says that it is not."""
        store, shown = self.checks.fleet.store, self.checks.shown
        if store is None or not shown or status not in ("finished", "stopped"):
            return
        last = shown[-1]
        told = "not saved" in error or (status == "finished" and last.step in self.failed)
        require(last not in self.checks.corruption.distrusted or told, f"{status}, but copies of {last} differed")
        require(last in store.listed() or told, f"{status}, but {last} is not in the store, and nobody says so")

    def nothing_usable(self) -> None:
        store = self.checks.fleet.store
        if store is not None:
            listed = self.known & set(store.listed()) - self.checks.corruption.distrusted
            usable = {v for v in listed if not self.is_gone(v)} | self._arrived()
            require(not usable, f"given up although {usable} could be gone back to")

    def deserves(self, error: str) -> bool:
        """Whether a run may end with this error because its store fails."""
        fleet = self.checks.fleet
        storage = fleet.scenario.storage
        if storage is not None and "worlds could not begin" in error:
            return bool(storage.misreads)
        if storage is None or "checkpoints in a row could not be written" not in error:
            return False
        troubled = storage.part_fails or storage.commit_fails or storage.slow or storage.told_never
        return bool(troubled) or not fleet.scenario.calm or self._words_are_lost

    @property
    def _words_are_lost(self) -> bool:
        fleet = self.checks.fleet
        return bool(fleet.scenario.network.lose) or any("cut" in w.struck for w in fleet.workers.values())
