"""Training a model: from Python with ElasticTrainer, from a command with `run`."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from evenkeel import __version__
from evenkeel.config import Config, ConfigError, load_config
from evenkeel.linux import UnsupportedSystemError, require_linux
from evenkeel.store.errors import StoreError

if TYPE_CHECKING:
    from ray.train import Result, RunConfig, ScalingConfig

    from evenkeel.engine.model import Model
    from evenkeel.runtime.prepare import Prepared

BAD_INPUT = 2


def run(config: Config, *, dry_run: bool = False, resume: str = "auto", out: TextIO = sys.stdout) -> int:
    """Trains as configured and returns the exit status (design, section 10); says in one line why it is not 0.

    Args:
        dry_run: checks what can be checked without a trace, and prints the plan, but starts nothing.
        resume: "auto", "never" (begin anew, as the run did at first) or the step of a checkpoint; what to do where
            there is a run of this name already.
    """
    try:
        require_linux()
        from evenkeel.runtime.look import check_shared, look_only
        from evenkeel.runtime.prepare import describe
        from evenkeel.runtime.run import run_prepared

        prepared = _prepare(config)
        if dry_run:
            check_shared(config)
            look_only(prepared)
            print(describe(prepared), file=out)
            return 0

        outcome = run_prepared(prepared, out, __version__, resume)
    except (ConfigError, StoreError, UnsupportedSystemError) as error:
        print(f"evenkeel: {error}", file=sys.stderr)
        return BAD_INPUT
    if outcome.error:
        print(f"evenkeel: {outcome.error}", file=sys.stderr)
    return outcome.status


class ElasticTrainer:
    """Trains one model on a changing set of workers.

    Args:
        config: a configuration, a mapping of its sections, or the path of a YAML file.
        model: a Model, or a function of the section `model`'s own keys that returns one; in place of model.name.
        scaling_config: num_workers (or a pair: fewest, most), use_gpu and resources_per_worker; in place of scaling.
        run_config: name, storage_path, failure_config.max_failures and checkpoint_config.num_to_keep.
        out: where progress is shown.

    Raises:
        ConfigError: for a wrong key or value, in one line.
    """

    def __init__(
        self,
        config: Config | Mapping[str, Any] | str | os.PathLike[str],
        *,
        model: Model | Callable[[Mapping[str, Any]], Model] | None = None,
        scaling_config: ScalingConfig | None = None,
        run_config: RunConfig | None = None,
        out: TextIO | None = None,
    ) -> None:
        values: dict[str, dict[str, Any]] = {}
        if scaling_config is not None:
            values["scaling"] = _scaling(scaling_config)
        if run_config is not None:
            values |= _run(run_config)
        self.config = _load(config, values)
        self._model = model
        self._out = out if out is not None else sys.stdout

    def fit(self) -> Result:
        """Trains to the end and returns the last metrics line and the run's directory.

        In the main thread SIGTERM and Ctrl-C ask the run to stop while this call lasts; in others nobody does.

        Raises:
            ConfigError: it cannot be trained like this; nothing was started.
            StoreError: the run directory cannot be read or written.
            ray.train.TrainingFailedError: training failed, or was stopped on request; `result` is what there is of it.
        """
        require_linux()
        from evenkeel.runtime.run import run_prepared

        prepared = _prepare(self.config, self._model)
        outcome = run_prepared(prepared, self._out, __version__)
        result = _result(prepared, outcome.error if outcome.status else "")
        if result.error is not None:
            raise result.error
        return result


def _prepare(config: Config, model: Model | Callable[[Mapping[str, Any]], Model] | None = None) -> Prepared:
    from evenkeel.runtime.prepare import prepare

    try:
        return prepare(config, model)
    except StoreError as error:
        raise config.error("run.storage_path", str(error)) from None


def _load(config: Config | Mapping[str, Any] | str | os.PathLike[str], values: Mapping[str, Any]) -> Config:
    if isinstance(config, Config):
        merged = load_config([], values={**config.as_mapping(), **_merged(config.as_mapping(), values)})
        return replace(merged, sources={**config.sources, **{k: "Python" for k in merged.sources if _said(k, values)}})
    if isinstance(config, Mapping):
        return load_config([], values={**config, **_merged(config, values)})
    return load_config([Path(config)], values=dict(values) or None)


def _merged(config: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    return {section: {**(config.get(section) or {}), **own} for section, own in values.items()}


def _said(key: str, values: Mapping[str, Any]) -> bool:
    section, _, name = key.partition(".")
    return name.partition(".")[0] in values.get(section, {})


def _scaling(given: Any) -> dict[str, Any]:
    _refuse_others("scaling_config", given, ("num_workers", "use_gpu", "resources_per_worker"))
    workers = given.num_workers
    values = {"workers": [workers, workers] if isinstance(workers, int) else list(workers), "use_gpu": given.use_gpu}
    if given.resources_per_worker:
        values["resources_per_worker"] = dict(given.resources_per_worker)
    return values


def _run(given: Any) -> dict[str, dict[str, Any]]:
    _refuse_others("run_config", given, ("name", "storage_path", "failure_config", "checkpoint_config"))
    unsaid = type(given)()
    # What nobody said Ray fills in, too: a name made of the time, a folder at home, and 0 failures, none to be retried.
    run: dict[str, Any] = {}
    if given.name is not None and _without_digits(given.name) != _without_digits(unsaid.name):
        run["name"] = given.name
    if given.storage_path != unsaid.storage_path:
        run["storage_path"] = given.storage_path
    values: dict[str, dict[str, Any]] = {"run": run} if run else {}
    checkpoint: dict[str, Any] = {}
    failures = given.failure_config.max_failures if given.failure_config else 0
    if failures:
        checkpoint["max_failures"] = None if failures < 0 else failures
    if given.checkpoint_config is not None and given.checkpoint_config.num_to_keep is not None:
        checkpoint["keep"] = given.checkpoint_config.num_to_keep
    return {**values, "checkpoint": checkpoint} if checkpoint else values


def _without_digits(name: str | None) -> str:
    return re.sub(r"\d", "", name or "")


def _refuse_others(name: str, given: Any, known: tuple[str, ...]) -> None:
    """What these ask for beyond the known fields means nothing here, and is not passed over in silence."""
    default = type(given)()
    for field in fields(given):
        value = getattr(given, field.name)
        if field.name not in known and value != getattr(default, field.name):
            raise ConfigError(f"is {value!r}; evenkeel takes only {', '.join(known)} of it", f"{name}.{field.name}")


def _result(prepared: Prepared, error: str) -> Result:
    from ray.train import Result, TrainingFailedError

    metrics = prepared.directory.metrics()
    failed = TrainingFailedError(error) if error else None
    result = Result(
        metrics=metrics[-1] if metrics else None, checkpoint=None, error=failed, path=prepared.directory.url
    )
    if failed is not None:
        failed.result = result  # type: ignore[attr-defined]
    return result
