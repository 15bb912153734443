"""A checkpoint for a new run, made of tensors that came from elsewhere.

With AdamW's moments it is step s of a run that moved here. Without them it is step 0 of a run that begins with these
weights: moments of zero go with no other step, because AdamW's correction of them counts the steps.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from math import prod

import numpy as np

from evenkeel.config import Config, ConfigError, config_from_yaml
from evenkeel.core.batches import batches
from evenkeel.core.boxes import full
from evenkeel.core.ids import IMPORTED, Version, WorkerId
from evenkeel.core.layout import Layout, Pipeline, Stage
from evenkeel.plan.state import KINDS
from evenkeel.store.checkpoint_part import Part, Piece
from evenkeel.store.checkpoint_reader import Checkpoint
from evenkeel.store.checkpoints import FOLDER, MAX_STEP, Checkpoints
from evenkeel.store.errors import StoreError
from evenkeel.store.final import ITEM_BYTES
from evenkeel.store.manifest import Content
from evenkeel.store.run_directory import RunDirectory
from evenkeel.store.untrusted import short
from evenkeel.tools.exporting import Origin
from evenkeel.tools.text import Advance

WRITER = "import"
PART_BYTES = 512 << 20
"""What is held in memory at a time, or one tensor where that is more."""
NAMED = 3
"""So many names are given where many are wrong."""


@dataclass(frozen=True, slots=True)
class Foreign:
    """A whole tensor of some folder.

    Attributes:
        tensor: "KIND/PARAMETER", as checkpoints name it.
        dtype: as safetensors names it.
        where: the file that holds it, for messages.
        read: its bytes, row-major.
    """

    tensor: str
    dtype: str
    shape: tuple[int, ...]
    where: str
    read: Callable[[], memoryview]


@dataclass(frozen=True, slots=True)
class Source:
    """A folder that something else wrote, or an export.

    Attributes:
        where: for messages.
        step: that its moments are the state after; None if it does not say.
        origin, config: what an export says beside its tensors; None and "" where something else wrote it.
    """

    where: str
    tensors: Sequence[Foreign]
    step: int | None
    origin: Origin | None = None
    config: str = ""


@dataclass(frozen=True, slots=True)
class Expected:
    """What the run that shall begin from it needs, by its configuration.

    Attributes:
        shapes: of the model's parameters.
        depth: how many layers the model has.
        dtype: in which parameters and moments are kept.
    """

    config: Config
    shapes: Mapping[str, tuple[int, ...]]
    depth: int
    dtype: str


@dataclass(frozen=True, slots=True)
class Imported:
    """What came of it. `converted` counts tensors whose dtype was changed; `zeroed`: the moments are zero."""

    checkpoint: Checkpoint
    converted: int
    zeroed: bool


def import_source(
    directory: RunDirectory, source: Source, step: int | None, expected: Expected | None, tell: Advance
) -> Imported:
    """Writes and commits the checkpoint.

    Args:
        step: as the user says.
        expected: what the tensors must be; None to take them as they are.
        tell: is told of bytes as they are written.

    Raises:
        StoreError: if the directory has a run or a checkpoint already, if tensors are missing, too many or of another
            shape, or if the step is unknown or contradicted; names the file, the tensor, and the way out.
    """
    store = Checkpoints(directory.files)
    check_new(directory, store)
    shapes = check_tensors(source, expected)
    zeroed = len(source.tensors) == len(shapes)
    at = Version(choose_step(source, step, zeroed), IMPORTED)
    store.remove(at.step)  # what an import that was interrupted has left
    dtypes = {t.tensor: target_dtype(t, expected) for t in source.tensors}
    parts: list[Part] = []
    for pieces in batches(_pieces(source.tensors, dtypes, zeroed, tell), lambda piece: piece.data.nbytes, PART_BYTES):
        parts.append(store.write(at, f"{WRITER}-{len(parts):04d}", pieces))
        del pieces  # not to be held while the next are read
    every = {f"{kind}/{name}": shape for name, shape in shapes.items() for kind in KINDS}
    content = _content(directory, source, expected, at.step)
    checkpoint = store.commit(at, content, parts, every, epoch=0)
    return Imported(checkpoint, sum(t.dtype != dtypes[t.tensor] for t in source.tensors), zeroed)


def total_bytes(source: Source, expected: Expected | None) -> int:
    """How many will be written."""
    sizes = [prod(t.shape) * ITEM_BYTES[target_dtype(t, expected)] for t in source.tensors]
    zeroed = all(t.tensor.startswith("param/") for t in source.tensors)
    return sum(sizes) * (len(KINDS) if zeroed else 1)


def check_new(directory: RunDirectory, store: Checkpoints) -> None:
    """Raises StoreError if a run began here, or may begin from a checkpoint that is here already."""
    if directory.exists():
        raise StoreError(f"{directory.url}: a run of this name exists; import into the directory of a new one")
    for step in store.steps():
        if store.open(step) is not None:
            what = f"has a checkpoint of step {step} already"
            raise StoreError(f"{directory.url}: {what}; remove its folder {FOLDER}/ to begin from another")


def check_tensors(source: Source, expected: Expected | None) -> dict[str, tuple[int, ...]]:
    """The parameters' shapes, if each has both moments or none has any, and all are what the model has.

    Raises:
        StoreError: one line that names what is wrong.
    """
    found: dict[str, Foreign] = {}
    for tensor in source.tensors:
        if tensor.tensor in found:
            raise StoreError(f"{tensor.where}: {short(tensor.tensor)!r} is in {found[tensor.tensor].where} too")
        found[tensor.tensor] = tensor
    shapes = {name.removeprefix("param/"): t.shape for name, t in found.items() if name.startswith("param/")}
    if not shapes:
        raise StoreError(f"{source.where}: holds no weights")
    wanted = {f"{kind}/{name}" for name in shapes for kind in KINDS}
    problems = [_listed("no tensor of a parameter or its AdamW moments", found.keys() - wanted)]
    if len(found) > len(shapes):
        problems.append(_listed("missing beside the other moments", wanted - found.keys()))
    if expected is not None:
        problems.append(_listed("missing of the model", expected.shapes.keys() - shapes.keys()))
        problems.append(_listed("not of the model", shapes.keys() - expected.shapes.keys()))
    for name, tensor in found.items():
        parameter = name.partition("/")[2]
        shape = (expected.shapes if expected else shapes).get(parameter, tensor.shape)
        if tensor.shape != shape:
            has, expects = short(list(tensor.shape)), short(list(shape))
            problems.append(f"{short(name)!r} has shape {has}, expected is {expects}")
    wrong = [problem for problem in problems if problem]
    if wrong:
        advice = " (--weights-only leaves the moments out)" if len(found) > len(shapes) else ""
        raise StoreError(f"{source.where}: {'; '.join(wrong[:NAMED])}{advice}")
    return shapes


def _listed(what: str, names: Set[str]) -> str:
    some = ", ".join(repr(short(name)) for name in sorted(names)[:NAMED])
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return f"{what}: {some}{more}" if names else ""


def choose_step(source: Source, said: int | None, zeroed: bool) -> int:
    """The step that the tensors are the state after.

    Args:
        said: by the user.
        zeroed: whether there are no moments.

    Raises:
        StoreError: if it cannot be known, or source and user contradict each other.
    """
    if zeroed:
        if said:
            what = f"holds no moments, which step {said} would need"
            raise StoreError(f"{source.where}: {what}; without --step the run begins with these weights at step 0")
        return 0
    known = source.step
    if known is not None and said is not None and known != said:
        what = f"is the state after step {known}, not {said}"
        raise StoreError(f"{source.where}: {what}; leave --step out, or begin anew at step 0 with --weights-only")
    step = said if known is None else known
    if step is None:
        what = "does not say which step its moments are of"
        raise StoreError(f"{source.where}: {what}; say --step N, or --weights-only to begin anew at step 0")
    if step > MAX_STEP:
        what = f"is said to be the state after step {short(step, 40)}, at most {MAX_STEP} can be written"
        raise StoreError(f"{source.where}: {what}; --weights-only begins anew at step 0")
    return step


# ---------------------------------------------------------------- what a run needs


def expected_of(directory: RunDirectory) -> Expected | None:
    """By the run's config.yaml; None if there is none. Imports torch, and the user's model if it is one.

    Raises:
        ConfigError: if the model cannot be made; names the file and key.
    """
    text = directory.read_config()
    if text is None:
        return None
    where = directory.files.where("config.yaml")
    config = config_from_yaml(text, where)
    from evenkeel.engine.model import model_shape
    from evenkeel.models.registry import load_model

    try:
        shape = model_shape(load_model(config.model.name, config.model.options))
    except ConfigError as error:
        raise config.blame(error) from None
    except Exception as error:  # the border to the user's own code, which may raise anything
        what = f"{config.model.name!r} raised {type(error).__name__}: {error}; --unchecked imports without it"
        raise config.error("model.name", what) from error
    shapes = {param.name: param.shape for layer in shape.layers for param in layer.params}
    return Expected(config, shapes, shape.depth, "F64" if config.train.precision == "fp64" else "F32")


def _content(directory: RunDirectory, source: Source, expected: Expected | None, step: int) -> Content:
    """The position in the data is the new run's own where that is known: it follows from the step."""
    if expected is not None:
        seed, samples = expected.config.run.seed, step * expected.config.train.global_batch
        config, depth = directory.read_config() or "", expected.depth
    else:
        seed, samples = (source.origin.seed, source.origin.samples) if source.origin else (0, 0)
        config, depth = source.config, 1
    layout = Layout((Pipeline((Stage(0, depth, (WorkerId(WRITER),)),), 0, 1),))
    return Content(seed=seed, samples=samples if step else 0, config=config, layout=layout)


# ---------------------------------------------------------------- bytes


def target_dtype(tensor: Foreign, expected: Expected | None) -> str:
    """In which a tensor is written: the run's; where that is unknown its own, but never less than F32."""
    if expected is not None:
        return expected.dtype
    return "F64" if tensor.dtype == "F64" else "F32"


def _pieces(tensors: Sequence[Foreign], dtypes: Mapping[str, str], zeroed: bool, tell: Advance) -> Iterator[Piece]:
    for t in tensors:
        dtype, box = dtypes[t.tensor], full(t.shape)
        data = converted(t.read(), t.dtype, dtype)
        yield Piece(t.tensor, dtype, t.shape, box, data)
        tell(data.nbytes)
        if zeroed:
            zeros = memoryview(bytes(data.nbytes))
            for kind in KINDS[1:]:
                yield Piece(f"{kind}/{t.tensor.removeprefix('param/')}", dtype, t.shape, box, zeros)
                tell(zeros.nbytes)


def converted(data: memoryview, old: str, new: str) -> memoryview:
    """The same numbers in another dtype; exact unless F64 becomes F32."""
    if old == new or not data.nbytes:
        return data
    if old == "BF16":  # the upper half of an F32; numpy has no such type
        values = np.left_shift(np.frombuffer(data, "<u2").astype("<u4"), 16).view("<f4")
    else:
        values = np.frombuffer(data, {"F64": "<f8", "F32": "<f4", "F16": "<f2"}[old])
    return memoryview(values.astype({"F64": "<f8", "F32": "<f4"}[new])).cast("B")
