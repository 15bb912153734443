"""All checkpoints of a run: checkpoints/step-XXXXXXXX/, each complete once it has a manifest.json.

Newest is the highest (generation, step): generations only grow, also when a run goes back and redoes steps.
"""

import re
from collections.abc import Callable, Collection, Mapping, Sequence

from evenkeel.core.ids import IMPORTED, Version
from evenkeel.store.checkpoint_part import Part, Piece, merge, write_part
from evenkeel.store.checkpoint_reader import Checkpoint
from evenkeel.store.errors import StoreError
from evenkeel.store.files import Files
from evenkeel.store.manifest import (
    CHUNK_BYTES,
    MAX_MANIFEST_BYTES,
    NAME,
    CheckpointDamaged,
    Content,
    from_json,
    part_generation,
    to_json,
)

FOLDER = "checkpoints"
_STEP = re.compile(r"step-([0-9]{8,18})")
MAX_STEP = 10**18 - 1


class Checkpoints:
    """Every method raises StoreError where the store fails, or a checkpoint is of a newer format than this code's.

    Args:
        chunk_bytes: how much of a file has one checksum, and so what reading holds in memory.
    """

    def __init__(self, files: Files, chunk_bytes: int = CHUNK_BYTES) -> None:
        self._files, self._chunk_bytes = files, chunk_bytes

    # ------------------------------------------------------------ writing

    def write(
        self, version: Version, worker: str, pieces: Sequence[Piece], moved: Callable[[], None] = lambda: None
    ) -> Part:
        """The part of one worker; see `write_part`."""
        return write_part(self._files, folder(version.step), version, worker, pieces, self._chunk_bytes, moved)

    def commit(
        self,
        version: Version,
        content: Content,
        parts: Sequence[Part],
        shapes: Mapping[str, tuple[int, ...]],
        *,
        epoch: int,
    ) -> Checkpoint:
        """Makes the checkpoint visible, if the parts are all there and cover every tensor of `shapes` exactly once.

        Where the step has a checkpoint already, the one of the same version stays, which counts as success, and one
        that is damaged or of an older generation gives way: the run went back and has redone the step. A controller
        that stood still since it looked does not overwrite what its successor wrote; but see Files.replace_if.

        Args:
            epoch: of the controller.

        Raises:
            StoreError: also if a part is missing or cut, or a later generation has committed this step.
        """
        name = f"{folder(version.step)}/{NAME}"
        where = self._files.where(name)
        try:
            new = Checkpoint(self._files, folder(version.step), merge(version, epoch, content, parts, shapes))
        except ValueError as error:
            raise StoreError(f"{where}: not written: {error}") from error
        for damage in new.damage(thorough=False):
            raise StoreError(f"{where}: not written: {damage}")
        data = to_json(new.manifest)
        if len(data) > MAX_MANIFEST_BYTES:
            raise StoreError(f"{where}: not written: it has {len(data)} bytes, at most {MAX_MANIFEST_BYTES} are read")
        seen: list[Checkpoint] = []

        def gives_way() -> bool:
            try:
                there = self.open(version.step)
            except CheckpointDamaged:
                return True
            if there is None or there.manifest.version < version:
                return True
            seen.append(there)
            return False

        if self._files.create(name, data) or self._files.replace_if(name, data, gives_way):
            return new
        if seen[-1].manifest.version == version:
            return seen[-1]
        newer = f"generation {seen[-1].manifest.version.generation}, this is of {version.generation}"
        raise StoreError(f"{where}: not written: the step has a checkpoint of {newer}")

    # ------------------------------------------------------------ finding

    def steps(self) -> list[int]:
        """Of all folders, ascending, also of checkpoints that are not complete."""
        return sorted(step for name in self._files.folders(FOLDER) if (step := _step_of(name)) is not None)

    def open(self, step: int) -> Checkpoint | None:
        """The checkpoint of that step; None if there is no complete one. Looks at nothing but the manifest.

        Raises:
            CheckpointDamaged: if the manifest is.
        """
        name = f"{folder(step)}/{NAME}"
        where = self._files.where(name)
        size = self._files.sizes(folder(step)).get(NAME, 0)
        if size > MAX_MANIFEST_BYTES:
            raise CheckpointDamaged(f"{where}: has {size} bytes, at most {MAX_MANIFEST_BYTES} are read")
        data = self._files.read(name)
        if data is None:
            return None
        manifest = from_json(data, where)
        if manifest.version.step != step:
            raise CheckpointDamaged(f"{where}: is of step {manifest.version.step}")
        return Checkpoint(self._files, folder(step), manifest)

    def look(self, step: int, thorough: bool) -> tuple[Checkpoint, list[CheckpointDamaged]] | None:
        """The checkpoint of that step, and all that is wrong with its files; None if there is no complete one.

        Files of one that another process removes or replaces in this moment are not wrong: its manifest goes first.

        Raises:
            CheckpointDamaged: if the manifest is.
        """
        found = self.open(step)
        while found is not None:
            wrong = list(found.damage(thorough))
            if not wrong or not self.is_gone(found):
                return found, wrong
            found = self.open(step)
        return None

    def is_gone(self, found: Checkpoint) -> bool:
        """Whether it was removed or replaced since it was opened: then what is missing of it is no damage.

        Raises:
            CheckpointDamaged: if the manifest is by now.
        """
        now = self.open(found.manifest.version.step)
        return now is None or now.manifest != found.manifest

    def newest_first(self) -> tuple[list[Checkpoint], dict[int, CheckpointDamaged]]:
        """Complete checkpoints whose files are all there and of the right size; and by step what is wrong with others.

        One that was imported and has no manifest is among the latter: a run must not begin as if it were not there.
        What was flipped inside a file shows when it is read, or by `Checkpoint.damage`; then take the next.
        """
        good: list[Checkpoint] = []
        damaged: dict[int, CheckpointDamaged] = {}
        for step in self.steps():
            try:
                looked = self.look(step, thorough=False)
            except CheckpointDamaged as error:
                damaged[step] = error
                continue
            if looked is not None and looked[1]:
                damaged[step] = looked[1][0]
            elif looked is not None:
                good.append(looked[0])
            elif self._is_imported(step):
                where = self._files.where(f"{folder(step)}/{NAME}")
                damaged[step] = CheckpointDamaged(f"{where}: missing: the import did not end well, or it was lost")
        return sorted(good, key=lambda found: _age(found.manifest.version), reverse=True), damaged

    # ------------------------------------------------------------ removing

    def remove(self, step: int) -> None:
        """The manifest first, so that a checkpoint that is half removed is invisible."""
        self._files.remove(f"{folder(step)}/{NAME}")
        self._files.remove_folder(folder(step))

    def prune(
        self,
        keep: int,
        line: Collection[Version] | None = None,
        agreed: Version | None = None,
        gone: Callable[[int], object] = bool,
    ) -> list[int]:
        """Removes all but the newest `keep` checkpoints; answers their steps. Also what was never completed.

        Only checkpoints whose files are all there count, and of these only `line` and the newest, so one that can be
        gone back to always stays. Nor do those of steps after the newest's: the run went back to before them. `agreed`
        stays in any case, and so does what was imported: it is where the run begins. Damaged ones stay as long as their
        like.

        Parts go if they are of an older version than the newest checkpoint, and are not its nor of another that stays.
        So do those that were begun and never finished, also in folders that hold nothing else, which an object store
        does not list. Whoever still writes one has been overtaken; what is written of a newer version is not touched,
        as its name says that it is newer. So no clock is asked, nor the writers.

        Args:
            gone: is told each step whose checkpoint is removed, at once: also where the store fails after that.

        Raises:
            ValueError: if `keep` is less than 1.
        """
        if keep < 1:
            raise ValueError(f"keep is {keep}; at least 1 checkpoint must stay")
        good, damaged = self.newest_first()
        if not good:
            return []
        newest = good[0].manifest.version
        of_line = [
            found.manifest
            for found in good
            if found.manifest.version.step <= newest.step
            and (line is None or found.manifest.version in (newest, *line))
        ]
        stay = [manifest for n, manifest in enumerate(of_line) if n < keep or manifest.version == agreed]
        oldest = min(manifest.version.step for manifest in stay)
        stay += [found.manifest for found in good if found.manifest.version.generation == IMPORTED]
        kept = {manifest.version.step: manifest for manifest in stay}
        removed = [found.manifest.version.step for found in good if found.manifest.version.step not in kept]
        removed += [step for step in damaged if step < oldest and not self._is_imported(step)]
        for step in removed:
            self._files.remove(f"{folder(step)}/{NAME}")
            gone(step)
        for step in self.steps():
            if step in kept:
                self._remove_parts(step, newest, {file.name for file in kept[step].files})
            elif step in removed or step not in damaged:
                self._remove_parts(step, newest, set())
        # Last, as not every key may list what was begun, nor every server can.
        self._files.drop_unfinished(FOLDER, lambda name: _is_part_before(newest, name))
        return sorted(removed)

    def _is_imported(self, step: int) -> bool:
        """Whether it was put here and not made by the run, by its parts: also where the manifest cannot be read."""
        return any(part_generation(name) == IMPORTED for name in self._files.names(folder(step)))

    def _remove_parts(self, step: int, newest: Version, own: set[str]) -> None:
        """Removes parts of older versions than `newest`, but `own`."""
        names = self._files.names(folder(step))
        old = [name for name in names if name not in own and _is_older(part_generation(name), step, newest)]
        if old == names and step < newest.step:
            # On a local path with what killed writers left in it. A newer part can be in here, unfinished and so
            # unlisted, only if the run went back since `newest` and this call is of before; then its writer fails, and
            # that one checkpoint.
            self._files.remove_folder(folder(step))
            return
        for name in old:
            self._files.remove(f"{folder(step)}/{name}")


def folder(step: int) -> str:
    return f"{FOLDER}/step-{step:08d}"


def _step_of(name: str) -> int | None:
    """Of the folder of that name in FOLDER; None if it is something else."""
    match = _STEP.fullmatch(name)
    return int(match[1]) if match and folder(int(match[1])) == f"{FOLDER}/{name}" else None


def _age(version: Version) -> tuple[int, int]:
    return version.generation, version.step


def _is_older(generation: int | None, step: int, than: Version) -> bool:
    return generation is not None and (generation, step) < _age(than)


def _is_part_before(than: Version, name: str) -> bool:
    """Whether the file of that name, relative to FOLDER, is a part of an older version."""
    of, _, part = name.partition("/")
    return (step := _step_of(of)) is not None and _is_older(part_generation(part), step, than)
