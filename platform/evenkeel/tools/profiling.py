"""`evenkeel profile`: what a run's model takes on the devices that there are, measured once and kept."""

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from evenkeel.config import Config, ConfigError, config_from_yaml, load_config
from evenkeel.config_values import HIDDEN, flatten
from evenkeel.store.errors import StoreError
from evenkeel.store.profiles import ProfileRecord, TimesRecord, to_json
from evenkeel.store.run_directory import PROFILE, RunDirectory
from evenkeel.tools.text import print_table, size_text, time_text

HEAD = ("layer", "kept", "hands on")
RUN_HELP = "RUN, a run's directory or its URL; or with --config any number of key=value."
Given = Annotated[list[str] | None, typer.Argument(metavar="RUN | key=value ...", help=RUN_HELP)]
Files = Annotated[list[Path] | None, typer.Option("--config", metavar="FILE", help="YAML; later files win.")]
Again = Annotated[bool, typer.Option("--again", help="Measure also where a profile is there that fits.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object instead.")]


def profile(given: Given = None, config: Files = None, again: Again = False, as_json: AsJson = False) -> None:
    """Shows what a run's model takes on each kind of device, layer by layer, and what the links take.

    What was not measured yet is: of a run by its own configuration, of one that is still to come by --config and
    key=value, as for training. It takes some seconds of some of the devices, and is kept as profile.json in the run's
    directory.
    """
    words = given or []
    if config:
        directory, record = _measured(load_config(config, words), again)
    elif len(words) == 1 and (again or "=" not in words[0] or Path(words[0]).exists()):
        directory, record = _of_run(words[0], again)
    else:
        raise ConfigError("expected the directory of one run, or --config FILE and any key=value", "profile")
    if as_json:
        typer.echo(json.dumps({**to_json(record), "directory": directory.url}))
    else:
        _print(record, directory.url)


def _of_run(url: str, again: bool) -> tuple[RunDirectory, ProfileRecord]:
    """What is there; measured first if there is none, or it is to be again."""
    directory = RunDirectory.at(url)
    found = None if again else directory.read_profile()
    if found is not None:
        return directory, found
    text = directory.read_config()
    if text is None:
        raise StoreError(f"{directory.url}: has neither {PROFILE} nor config.yaml; measure with --config FILE")
    where = directory.files.where("config.yaml")
    config = config_from_yaml(text, where)
    hidden = [key for key, value in flatten(config.as_mapping()).items() if value == HIDDEN]
    if hidden:
        raise ConfigError("is a secret, which a run does not write down; measure with --config FILE", hidden[0], where)
    return _measured(config, again, directory)


def _measured(config: Config, again: bool, moved: RunDirectory | None = None) -> tuple[RunDirectory, ProfileRecord]:
    """`moved` is where the run lies, if that is not where its configuration says."""
    # These import torch and Ray: not before it is clear that something is to be measured.
    from evenkeel.runtime.profiled import key_of, lacking
    from evenkeel.runtime.profiling import measure, prepare_to_measure

    sys.path.insert(0, str(Path.cwd()))  # where a user's own "module:function" lies, like for the workers
    prepared = prepare_to_measure(config)
    prepared = replace(prepared, directory=moved or prepared.directory)
    found = None if again else prepared.directory.read_profile()
    if found is not None:
        why = key_of(prepared.config, prepared.spec.policy.model).difference(found.key)
        why = why or lacking(prepared.config, found)
        if not why:
            return prepared.directory, found
        print(f"evenkeel: {prepared.directory.files.where(PROFILE)} does not fit: {why}; measuring", file=sys.stderr)
    return prepared.directory, measure(prepared)


def _print(record: ProfileRecord, url: str) -> None:
    key = record.key
    typer.echo(f"profile    {key.model}, micro-batches of {key.micro_batch}, {key.precision}; {url}")
    typer.echo(f"measured   {time_text(record.time)}, in {record.seconds:.1f} s")
    for device in record.devices:
        typer.echo(f"device     {device.kind}, {size_text(device.memory)}")
    for link in record.links:
        speed = f"{size_text(link.bytes_per_s)}/s, {link.latency_s * 1e6:.1f} us"
        typer.echo(f"link       {' to '.join(link.kinds)}, {link.where}: {speed}")
    typer.echo("")
    columns = [f"{_label(times, len(record.devices) > 1)} {part}" for times in record.times for part in ("fwd", "bwd")]
    rows = [
        [name, size_text(record.kept_bytes[i]), size_text(record.output_bytes[i]), *_row(record, i)]
        for i, name in enumerate(key.layers)
    ]
    head = (*HEAD, *columns)
    print_table(head, rows, head[1:])


def _label(times: TimesRecord, several: bool) -> str:
    return f"{times.kind} TP {times.tensor}" if several else f"TP {times.tensor}"


def _row(record: ProfileRecord, layer: int) -> list[str]:
    return [f"{s * 1e3:.3f} ms" for t in record.times for s in (t.forward_s[layer], t.backward_s[layer])]
