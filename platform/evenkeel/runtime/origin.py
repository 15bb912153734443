"""What a run goes on from: the version that the user asks for, of checkpoints that are of its model."""

from collections.abc import Iterator, Mapping

from evenkeel.config import ConfigError
from evenkeel.control.beginning import import_of
from evenkeel.control.divergence import distrusted
from evenkeel.control.entries import Entry, WorldOpened
from evenkeel.control.saving import ANOTHER
from evenkeel.core.codec import load
from evenkeel.core.ids import IMPORTED, INITIAL, Version
from evenkeel.runtime import saving
from evenkeel.runtime.prepare import Prepared
from evenkeel.store.checkpoints import Checkpoints
from evenkeel.store.manifest import Manifest
from evenkeel.store.run_directory import RunDirectory

RESUME = "--resume"
NAMED = 3
"""So many tensors are named where many are wrong."""


def version_to_resume(directory: RunDirectory, resume: str) -> Version | None:
    """The version that is asked for; None to leave the choice to the controller.

    Raises:
        ConfigError: there is no complete checkpoint of that step, or it may hold a wrong copy; or the one that the run
            began from is not there any more.
    """
    if resume == "auto" or (resume == "never" and not directory.exists()):
        return None
    saved, damaged = saving.find(directory)
    entries = [load(entry, Entry) for entry in directory.journal().read_all()]
    beside = "".join(f"; {error}" for error in damaged)
    if resume == "never":
        return _beginning(directory, saved, entries, beside)
    doubts = distrusted(entries)
    for version in saved:
        if version.step == int(resume):
            if version in doubts:
                what = f"the checkpoint of step {resume} is distrusted: {doubts[version]}"
                raise ConfigError(f"{directory.url}: {what}", RESUME)
            return version
    saved = tuple(version for version in saved if version not in doubts)
    there = f"there are {', '.join(str(v.step) for v in saved)}" if saved else "there is none"
    raise ConfigError(f"{directory.url} has no complete checkpoint of step {resume}; {there}{beside}", RESUME)


def _beginning(
    directory: RunDirectory, saved: tuple[Version, ...], entries: list[Entry], beside: str
) -> Version | None:
    """As the first start of the run would have it, or had it: what was imported, else what the seed gives."""
    worlds = [entry.world for entry in entries if isinstance(entry, WorldOpened)]
    began = next((version for world in reversed(worlds) if (version := import_of(world)) is not None), None)
    imported = [version for version in saved if version.generation == IMPORTED]
    if imported:
        return began if began in imported else imported[0]
    if began is not None:
        what = f"the checkpoint of step {began.step}, which {directory.url} began from, is damaged or gone"
        raise ConfigError(f"{what}; {ANOTHER}{beside}", RESUME)
    return INITIAL if worlds or saved else None


def check_fit(prepared: Prepared) -> None:
    """Compares the manifests of all complete checkpoints of the run with its model: any of them may be read.

    Raises:
        ConfigError: a tensor is missing, too many, or of another shape or type.
        StoreError: as for `saving.find`.
    """
    config, given = prepared.config, prepared.maker.model
    shapes = saving.shapes(prepared.spec.policy.model)
    dtype = "F64" if config.train.precision == "fp64" else "F32"
    good, _ = Checkpoints(prepared.directory.files).newest_first()
    for found in good:
        wrong = list(_misfits(found.manifest, shapes))
        if wrong:
            more = f"; {len(wrong) - NAMED} more" if len(wrong) > NAMED else ""
            what = f"is not that of {found.url}: {'; '.join(wrong[:NAMED])}{more}; take that, or another run.name"
            raise ConfigError(what, "model", "Python") if given is not None else config.error("model.name", what)
        for tensor in found.manifest.tensors:
            if tensor.dtype != dtype:
                keeps = f"is {config.train.precision!r}, which keeps {dtype}"
                has = f"{tensor.tensor!r} in {found.url} is {tensor.dtype}"
                raise config.error("train.precision", f"{keeps}, but {has}; import it with this run's config.yaml")


def _misfits(manifest: Manifest, shapes: Mapping[str, tuple[int, ...]]) -> Iterator[str]:
    """Each tensor that is not as the model has it, parameters first."""
    there = {tensor.tensor: tensor.shape for tensor in manifest.tensors}
    for name in sorted({*there, *shapes}, key=lambda name: (not name.startswith("param/"), name)):
        if name not in there:
            yield f"{name!r} of shape {list(shapes[name])} is missing there"
        elif name not in shapes:
            yield f"{name!r} of shape {list(there[name])} is not in the model"
        elif there[name] != shapes[name]:
            yield f"{name!r} has shape {list(there[name])} there and {list(shapes[name])} in the model"
