"""`evenkeel checkpoint`: what a run has saved, shown, verified, taken out and brought in."""

import json
import sys
from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from evenkeel.store.checkpoints import Checkpoints
from evenkeel.store.errors import StoreError
from evenkeel.store.files import Files, LocalFiles, open_files
from evenkeel.store.manifest import CheckpointDamaged
from evenkeel.store.run_directory import RunDirectory
from evenkeel.tools import listing
from evenkeel.tools.choose import checkpoints_of, choose
from evenkeel.tools.distrust import FLAG, distrust_of, distrusted_steps
from evenkeel.tools.text import Advance, print_table, progress

if TYPE_CHECKING:
    from evenkeel.tools.importing import Source

DAMAGED = 3
"""Exit status where a checkpoint was asked for, or verified, that is not what was written."""

app = typer.Typer(
    no_args_is_help=True,
    help="Shows, verifies, exports and imports the checkpoints of a run.",
    epilog="Exit status: 0; 2 for bad input, in one line; 3 if what was asked for is damaged.",
)


class Format(StrEnum):
    """What other tools read and write."""

    SAFETENSORS = "safetensors"
    DCP = "dcp"


Run = Annotated[str, typer.Argument(metavar="RUN", help="The run's directory, or its URL.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object instead.")]
Step = Annotated[int | None, typer.Option("--step", min=0, metavar="N", help="Which; without it the newest.")]
Distrusted = Annotated[
    bool, typer.Option(FLAG, help="Take also what may hold a wrong copy of the state; `ls` says which, and why.")
]
How = Annotated[
    Format,
    typer.Option("--format", help="safetensors: files that plain PyTorch loads; dcp: torch.distributed.checkpoint's."),
]


@app.command("ls")
def ls(run: Run, as_json: AsJson = False) -> None:
    """Lists all checkpoints, newest first, also what is distrusted, damaged or half-written, and why."""
    directory = RunDirectory.at(run)
    checkpoints = checkpoints_of(directory.files)
    rows = listing.listing(directory, checkpoints, distrust_of(directory.files, True, _warn))
    if as_json:
        _print_json({"directory": directory.url, "checkpoints": [asdict(row) for row in rows]})
    elif rows:
        print_table(listing.HEAD, [listing.row(row) for row in rows], listing.RIGHT)
    else:
        typer.echo(f"{directory.url} has no checkpoint yet")


@app.command("inspect")
def inspect(run: Run, step: Step = None, as_json: AsJson = False) -> None:
    """Shows who held the state, its tensors and files, and the configuration that made it."""
    from evenkeel.tools import describe

    files = RunDirectory.at(run).files
    distrust = distrust_of(files, True, _warn)
    checkpoint = choose(files, step, {}, _warn)  # shown, not handed out
    why = distrust.get(checkpoint.manifest.version, "")
    if as_json:
        _print_json(describe.record(checkpoint, why))
    else:
        typer.echo(describe.description(checkpoint, why))


@app.command("verify")
def verify(
    run: Run,
    step: Annotated[int | None, typer.Option("--step", min=0, metavar="N", help="Which; without it all.")] = None,
    distrusted: Distrusted = False,
    as_json: AsJson = False,
) -> None:
    """Reads every byte and compares it with the checksums; names each damaged file and range. Exit status 3 if any."""
    files = RunDirectory.at(run).files
    checkpoints, distrust = checkpoints_of(files), distrust_of(files, distrusted, _warn)
    if step is not None:
        choose(files, step, {} if distrusted else distrust, _warn)  # says what is there instead
    doubts = {at: why for at, why in distrusted_steps(checkpoints, distrust).items() if step in (None, at)}
    for at, why in doubts.items():
        _warn(f"step {at} is distrusted{'' if distrusted else ', so it is not verified'}: {why}")
    found: dict[int, list[str]] = {}
    for at in reversed(checkpoints.steps()) if step is None else (step,):
        damage = _damage(files, at) if distrusted or at not in doubts else None
        if damage is None:
            continue
        found[at] = damage
        if not as_json:
            lines = [f"step {at}: {len(damage)} damaged" if damage else f"step {at}: whole", *damage]
            typer.echo("\n  ".join(lines))
    if not found:
        raise StoreError(f"{files.where()}: no {'other ' if doubts else ''}complete checkpoint to verify")
    if as_json:
        rows = [{"step": at, "damage": damage} for at, damage in found.items()]
        doubted = [{"step": at, "why": why} for at, why in doubts.items()]
        _print_json({"directory": files.where(), "checkpoints": rows, "distrusted": doubted})
    if any(found.values()):
        raise typer.Exit(DAMAGED)


def _damage(files: Files, step: int) -> list[str] | None:
    """What is wrong with a checkpoint, each in one line; None if it is not complete."""
    try:
        checkpoint = Checkpoints(files).open(step)
        if checkpoint is None:
            return None
        with progress(f"step {step}", sum(record.size for record in checkpoint.manifest.files)) as tell:
            looked = Checkpoints(_watched(files, tell)).look(step, thorough=True)
        return None if looked is None else [str(error) for error in looked[1]]
    except CheckpointDamaged as error:  # its manifest is
        return [str(error)]


@app.command("export")
def export(
    run: Run,
    to: Annotated[str, typer.Option("--to", metavar="DIR", help="A new folder; for safetensors also a URL.")],
    how: How,
    step: Step = None,
    weights_only: Annotated[bool, typer.Option("--weights-only", help="Leave AdamW's moments out.")] = False,
    distrusted: Distrusted = False,
    as_json: AsJson = False,
) -> None:
    """Writes a checkpoint as a folder that plain PyTorch loads with no evenkeel installed."""
    from evenkeel.tools.describe import tensor_bytes

    files = RunDirectory.at(run).files
    distrust = distrust_of(files, distrusted, _warn)
    checkpoint, target = choose(files, step, {} if distrusted else distrust, _warn), open_files(to)
    at = checkpoint.manifest.version
    if at in distrust:
        _warn(f"step {at.step} is distrusted: {distrust[at]}")
    tensors = [t for t in checkpoint.manifest.tensors if not weights_only or t.tensor.startswith("param/")]
    try:
        with progress("export", sum(map(tensor_bytes, tensors))) as tell:
            if how is Format.SAFETENSORS:
                from evenkeel.tools import plain

                plain.export(checkpoint, target, weights_only, tell)
            else:
                from evenkeel.tools import dcp

                dcp.export(checkpoint, _local(target), weights_only, tell)
    except CheckpointDamaged as error:
        if not Checkpoints(files).is_gone(checkpoint):
            raise
        what = "was removed or replaced by the run while it was read; take a newer step, or raise checkpoint.keep"
        raise StoreError(f"{checkpoint.url}: {what}") from error
    if as_json:
        _print_json({"checkpoint": checkpoint.url, "step": at.step, "to": target.where(), "tensors": len(tensors)})
    else:
        typer.echo(f"step {at.step}: {len(tensors)} tensors in {target.where()}")


@app.command("import")
def import_(
    run: Run,
    source: Annotated[str, typer.Option("--from", metavar="DIR", help="A folder; for safetensors also a URL.")],
    how: How,
    step: Annotated[
        int | None, typer.Option("--step", min=0, metavar="N", help="Of the moments, if the folder does not say it.")
    ] = None,
    weights_only: Annotated[
        bool, typer.Option("--weights-only", help="Leave the folder's moments: a new run begins with these weights.")
    ] = False,
    unchecked: Annotated[
        bool, typer.Option("--unchecked", help="Do not compare names and shapes with config.yaml's model.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Makes a checkpoint that a new run of RUN's name begins from.

    With AdamW's moments it is the state after their step; without them it is step 0, and moments are zero. It
    stays there: with --resume never the run begins from it again.

    Names and shapes are compared with the model of RUN/config.yaml, if that is there.
    """
    from evenkeel.tools import importing

    folder, directory = open_files(source), RunDirectory.at(run)
    found = _source(folder, how, weights_only)
    sys.path.append(str(Path.cwd()))  # where a user's own "module:function" lies
    expected = None if unchecked else importing.expected_of(directory)
    with progress("import", importing.total_bytes(found, expected)) as tell:
        done = importing.import_source(directory, found, step, expected, tell)
    at, count = done.checkpoint.manifest.version.step, len(done.checkpoint.manifest.tensors)
    if as_json:
        values = {"checkpoint": done.checkpoint.url, "step": at, "tensors": count, "converted": done.converted}
        _print_json({**values, "moments_zero": done.zeroed, "checked": expected is not None})
        return
    notes = ["moments are zero"] if done.zeroed else []
    notes += [f"{done.converted} converted to another dtype"] if done.converted else []
    notes += [] if expected else ["not compared with any model"]
    typer.echo(f"step {at}: {count} tensors in {done.checkpoint.url}" + "".join(f"; {note}" for note in notes))


def _source(folder: Files, how: Format, weights_only: bool) -> "Source":
    if how is Format.SAFETENSORS:
        from evenkeel.tools import plain

        return plain.source(folder, weights_only)
    from evenkeel.tools import dcp

    return dcp.source(_local(folder), weights_only)


def _local(files: Files) -> LocalFiles:
    if not isinstance(files, LocalFiles):
        raise StoreError(f"{files.where()}: torch.distributed.checkpoint's format is for local folders only; copy it")
    return files


class _Watched:
    """Files that tell of each byte that is read."""

    def __init__(self, files: Files, tell: Advance) -> None:
        self._files, self._tell = files, tell

    def __getattr__(self, name: str) -> Any:
        return getattr(self._files, name)

    def read_into(self, name: str, offset: int, buffer: memoryview) -> int | None:
        got = self._files.read_into(name, offset, buffer)
        self._tell(got or 0)
        return got


def _watched(files: Files, tell: Advance) -> Files:
    return cast(Files, _Watched(files, tell))


def _warn(text: str) -> None:
    typer.echo(f"evenkeel: {text}", err=True)


def _print_json(values: dict[str, Any]) -> None:
    typer.echo(json.dumps(values))
