"""The command `evenkeel`. Everything it knows of a run it reads from the run's directory."""

import json
import sys
from typing import Annotated, Any

import typer
from typer.exceptions import TyperException

from evenkeel import __version__
from evenkeel.config_values import ConfigError
from evenkeel.linux import UnsupportedSystemError, require_linux
from evenkeel.observe.console import summary_text
from evenkeel.store.errors import StoreError
from evenkeel.store.manifest import CheckpointDamaged
from evenkeel.store.run_directory import RunDirectory
from evenkeel.store.untrusted import short
from evenkeel.tools import checkpoint_cli, planning, profiling, simulating

BAD_INPUT = 2

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)
app.add_typer(checkpoint_cli.app, name="checkpoint")
app.command("plan")(planning.plan)
app.command("profile")(profiling.profile)
app.command("simulate")(simulating.simulate)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"evenkeel {__version__}")
        raise typer.Exit


@app.callback()
def evenkeel(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Trains PyTorch models on changing sets of unequal GPUs, and does not stop."""


Run = Annotated[str, typer.Argument(metavar="RUN", help="The run's directory, or its URL.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object instead.")]


@app.command()
def status(run: Run, as_json: AsJson = False) -> None:
    """Says how far a run is, and what happened to it."""
    directory = RunDirectory.at(run)
    record = directory.read_run()
    if record is None:
        raise StoreError(f"{directory.url}: no run here (there is no run.json)")
    values = {name: getattr(record, name) for name in record.__dataclass_fields__}
    metrics, events = directory.metrics(), directory.events()
    if as_json:
        typer.echo(json.dumps(status_record(values, metrics, events, directory.url)))
        return
    try:
        text = summary_text(values, metrics, events, directory.url)
    except (AttributeError, KeyError, OverflowError, TypeError, ValueError) as error:
        what = f"metrics or events are not what a run writes: {type(error).__name__}: {short(error)}"
        raise StoreError(f"{directory.url}: {what}; --json gives the last as they are") from None
    typer.echo(text)


def status_record(
    run: dict[str, Any], metrics: list[dict[str, Any]], events: list[dict[str, Any]], url: str
) -> dict[str, Any]:
    """run.json with the last metrics line ("last", null before the first) and all incidents."""
    incidents = [e for e in events if e.get("event") == "incident"]
    return {**run, "last": metrics[-1] if metrics else None, "incidents": incidents, "directory": url}


def main() -> None:
    """Entry point of the installed command. Bad input is one line and exit status 2, a damaged checkpoint 3."""
    try:
        require_linux()
        sys.exit(app(standalone_mode=False))
    except TyperException as error:  # options and arguments; without any its text is empty, as help was printed
        if text := error.format_message():
            print(f"evenkeel: {text}", file=sys.stderr)
        sys.exit(BAD_INPUT)
    except (ConfigError, StoreError, UnsupportedSystemError) as error:
        print(f"evenkeel: {error}", file=sys.stderr)
        sys.exit(checkpoint_cli.DAMAGED if isinstance(error, CheckpointDamaged) else BAD_INPUT)


if __name__ == "__main__":
    main()
