"""From a configuration to what a worker trains. Runs in the driver, to check it, and again in every worker."""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from threading import Event
from typing import Any

import torch
from fsspec.config import conf
from torch import Tensor

from evenkeel.config import Config, ConfigError
from evenkeel.config_values import hide_in_url, hide_secrets, secret_values
from evenkeel.core.ids import Version, WorkerId
from evenkeel.data.dataset import Data
from evenkeel.data.registry import load_data
from evenkeel.engine.faults import FaultPlan
from evenkeel.engine.job import CheckpointError, FinalTensors, Job, Piece, Settings
from evenkeel.engine.model import Model
from evenkeel.models.registry import load_model
from evenkeel.runtime import saving
from evenkeel.store import checkpoint_part
from evenkeel.store.checkpoint_reader import Want
from evenkeel.store.failures import hide, reveals, secrets_in
from evenkeel.store.final import TensorSpec
from evenkeel.store.manifest import CheckpointDamaged
from evenkeel.store.run_directory import RunDirectory

log = logging.getLogger(__name__)

CONTROLLER = "controller"
ModelSource = Model | Callable[[Mapping[str, Any]], Model]

_DTYPES = {torch.float32: "F32", torch.float64: "F64", torch.bfloat16: "BF16", torch.float16: "F16"}


@dataclass(frozen=True, slots=True)
class JobMaker:
    """Makes a worker's job in the worker's own process. Picklable.

    Attributes:
        config: paths of the data are absolute, for workers run in other directories.
        folder: path or URL of the run directory.
        fingerprint: of the training data that the run began with.
        model: given in Python, in place of model.name.
    """

    config: Config
    folder: str
    fingerprint: str
    model: ModelSource | None = None

    def __call__(self, worker_id: WorkerId) -> Job:
        """Raises ConfigError where this worker finds other data than the run began with."""
        with without_secrets(self.config):
            model = make_model(self.config, self.model)
            data = make_data(self.config, model)
            if data.train.fingerprint() != self.fingerprint:
                path = hide_in_url(self.config.data.path)
                what = f"{path} has changed since the run began; put it back, or begin another run"
                raise self.config.error("data.path", what)
            job = Job(
                model=model,
                train=data.train,
                eval=data.eval,
                settings=make_settings(self.config),
                write_final=self._write_final,
                save=self._save,
                load=self._load,
                fault_once=self._fault_once,
                clean=partial(hide, secrets=secrets_of(self.config)),
            )
            job.prepare()  # computed once and kept: a spare is ready when it has nothing left to prepare
            return job

    def _patient(self) -> RunDirectory:
        return RunDirectory.at(self.folder).patient(lambda trouble: log.warning("%s", trouble.error), Event().wait)

    def _fault_once(self, index: int) -> bool:
        return self._patient().claim_fault(self.config.fault_keys()[index])

    def _save(
        self,
        version: Version,
        worker_id: WorkerId,
        pieces: Sequence[Piece],
        report: Callable[[str], None],
        moved: Callable[[], None],
    ) -> str:
        stored = [
            checkpoint_part.Piece(p.tensor, _DTYPES[p.data.dtype], p.shape, p.box, _bytes(p.data)) for p in pieces
        ]
        run = RunDirectory.at(self.folder)
        return saving.write(run, version, worker_id, stored, lambda trouble: report(str(trouble.error)), moved)

    def _load(self, version: Version, pieces: Sequence[Piece], moved: Callable[[], None]) -> None:
        wants = [Want(p.tensor, p.box, _bytes(p.data), _DTYPES[p.data.dtype], p.shape) for p in pieces]
        try:
            saving.read(self._patient(), version, wants, moved)
        except (CheckpointDamaged, ValueError) as error:  # or of another model
            file = error.file if isinstance(error, CheckpointDamaged) else ""
            raise CheckpointError(str(error), file) from error

    def _write_final(self, final: FinalTensors) -> None:
        specs = [TensorSpec(name, _DTYPES[final.dtype], shape) for name, shape in final.shapes.items()]
        with self._patient().final(specs, hide_secrets(self.config.as_mapping())) as writer:
            for name, tensor in final.tensors:
                writer.write(name, _bytes(tensor))


def _bytes(tensor: Tensor) -> memoryview:
    flat = tensor.detach().to("cpu").contiguous().reshape(-1)
    return memoryview(flat.view(torch.uint8).numpy().data)


def make_settings(config: Config) -> Settings:
    train = config.train
    return Settings(
        seed=config.run.seed,
        last_step=train.steps,
        global_batch=train.global_batch,
        micro_batch=train.micro_batch,
        learning_rate=train.learning_rate,
        weight_decay=train.weight_decay,
        warmup_steps=train.warmup_steps,
        schedule=train.schedule,
        grad_clip=train.grad_clip,
        precision=train.precision,
        eval_every=train.eval_every,
        slowdown=dict(config.emulate.slowdown),
        slow_from=config.emulate.from_step or 1,
        slow_to=config.emulate.to_step,
        faults=tuple(
            FaultPlan(index, fault.step, fault.phase, fault.target, fault.kind)
            for index, fault in enumerate(config.faults)
            if fault.target != CONTROLLER
        ),
    )


def secrets_of(config: Config) -> frozenset[str]:
    """What nothing may tell that is told of an error: of the configuration, and of what clients of stores are given."""
    return secrets_in([secret_values(config.as_mapping()), conf])


@contextmanager
def without_secrets(config: Config) -> Iterator[None]:
    """Errors of the user's code that show a secret of the configuration are raised anew, without it and their cause."""
    try:
        yield
    except BaseException as error:  # the border to the user's own code, which may raise anything, sys.exit() too
        secrets = secrets_of(config)
        if not reveals(error, secrets):
            raise
        if isinstance(error, ConfigError):
            raise ConfigError(hide(error.problem, secrets), error.key, error.source) from None
        raise RuntimeError(f"{type(error).__name__}: {hide(str(error), secrets)}") from None


def make_model(config: Config, given: ModelSource | None = None) -> Model:
    """Raises ConfigError; what a user's own function raises comes through as it is."""
    if isinstance(given, Model):
        return given
    if given is not None:
        model = given(dict(config.model.options))
        if not isinstance(model, Model):
            raise ConfigError(f"the function returned {type(model).__name__}, not a Model", "model", "Python")
        return model
    return load_model(config.model.name, config.model.options)


def make_data(config: Config, model: Model) -> Data:
    """Raises ConfigError; what a user's own function raises comes through as it is."""
    section = config.data
    return load_data(section.name, {"path": section.path, "eval_path": section.eval_path, **section.options}, model)
