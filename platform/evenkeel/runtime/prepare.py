"""Everything about a run that can be known, and found wrong, before anything is started."""

import os
import sysconfig
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from evenkeel.config import Config, ConfigError, with_absolute_data, with_absolute_storage
from evenkeel.config_check import STEP_PHASES
from evenkeel.config_values import hide_in_url
from evenkeel.control.policy import Policy
from evenkeel.core.ids import NodeId
from evenkeel.core.layout import WorkerInfo
from evenkeel.core.model import ModelShape
from evenkeel.data.dataset import Data
from evenkeel.engine.model import Model, boundaries_of, model_shape
from evenkeel.engine.state import PRECISIONS
from evenkeel.observe.console import emulation_text
from evenkeel.plan.cuts import most_stages
from evenkeel.plan.layout import Infeasible, Planned, Wish, plan_layout
from evenkeel.plan.learning_rate import learning_rate
from evenkeel.plan.speeds import Speeds
from evenkeel.runtime.cluster import Need, given_address
from evenkeel.runtime.job import CONTROLLER, JobMaker, ModelSource, make_data, make_model, without_secrets
from evenkeel.runtime.names import worker_id
from evenkeel.runtime.profiled import profiled, slowed
from evenkeel.runtime.spec import ControllerFault, RunSpec, WorkerSpec
from evenkeel.store.run_directory import RunDirectory


@dataclass(frozen=True, slots=True)
class Prepared:
    """A run that could be started.

    Attributes:
        config: with an absolute storage path.
        need: what it takes of Ray.
        fingerprint: of the training data.
        note: a line on the profile that lies in its directory; "" if there is none.
        maker: to be pickled into the spec once Ray, which knows how to pickle it, may be imported.
    """

    config: Config
    directory: RunDirectory
    spec: RunSpec
    need: Need
    fingerprint: str
    note: str
    maker: JobMaker


def prepare(config: Config, model: ModelSource | None = None) -> Prepared:
    """Checks all of a configuration against the model and the data that it names.

    Args:
        model: given in Python, in place of model.name.

    Raises:
        ConfigError: one line that names key and file.
        StoreError: the storage path is no path or URL that can be opened.
    """
    config = with_absolute_storage(config)
    check_device(config)
    with _model_blamed(config, model):
        made = make_model(config, model)
        shape = model_shape(made)
    check_degrees(config, shape)
    found = with_absolute_data(config)
    with blamed(config, "data.name", repr(config.data.name)):
        data = make_data(found, made)
        fingerprint = data.train.fingerprint()
        inputs, _ = check_samples(data.train.get(range(1)))
        check_data(config, data, made)
    with _model_blamed(config, model):
        boundaries_of(made, inputs, PRECISIONS[config.train.precision])
    directory = RunDirectory.of(config.run.storage_path, config.run.name)
    known = profiled(config, shape, directory)
    each = resources(config)
    worker = WorkerSpec(
        folder=directory.url,
        make=b"",
        device="cuda" if config.scaling.use_gpu else "cpu",
        resources=each,
        tell_spares=any(fault.target == "spare" for fault in config.faults),
    )
    spec = RunSpec(
        name=config.run.name,
        folder=directory.url,
        policy=make_policy(config, shape, known.speeds),
        worker=worker,
        global_batch=config.train.global_batch,
        lr=make_schedule(config),
        orphan_s=60 * config.run.orphan_minutes,
        faults=controller_faults(config),
        seed=config.run.seed,
        keep=config.checkpoint.keep,
        emulated=emulated(config),
    )
    need = Need(config.scaling.workers[1] + config.scaling.spares, each, config.scaling.workers[0])
    maker = JobMaker(found, directory.url, fingerprint, model)
    return Prepared(config, directory, spec, need, fingerprint, known.note, maker)


def check_device(config: Config) -> None:
    """Raises ConfigError if a local Ray is to give GPUs that are not there; of a given cluster Ray knows."""
    if config.scaling.use_gpu and given_address() is None and torch.cuda.device_count() == 0:
        raise config.error("scaling.use_gpu", "is true, but PyTorch finds no GPU on this machine")


def check_degrees(config: Config, shape: ModelShape) -> None:
    """Raises ConfigError where the model's layers, heads and widths do not allow the degrees asked for."""
    parallel, micro_batches = config.parallel, config.train.micro_batches
    if parallel.tensor is not None and shape.tensor_divides % parallel.tensor:
        cut = [(p.shape[p.split], p.name) for layer in shape.layers for p in layer.params if p.split is not None]
        uneven = [f"{size}, the width of {name}" for size, name in cut if size % parallel.tensor]
        most = f"{shape.tensor_divides}, the most that heads and widths allow"
        raise config.error("parallel.tensor", f"{parallel.tensor} does not divide {uneven[0] if uneven else most}")
    stages = most_stages([layer.cost for layer in shape.layers])
    if parallel.pipeline is not None and parallel.pipeline > stages:
        what = f"{parallel.pipeline} stages, but the model has only {stages} layers with work of their own"
        raise config.error("parallel.pipeline", what)
    for i, fault in enumerate(config.faults):
        if fault.target in {f"stage:{n}" for n in range(stages, config.scaling.workers[1])}:
            what = f"is {fault.target!r}, but the model has only {stages} layers with work of their own"
            raise config.error(f"faults.{i}.target", what)
    if parallel.data is not None and parallel.data > micro_batches:
        what = f"{parallel.data} pipelines, but a step has only {micro_batches} micro-batches"
        raise config.error("parallel.data", what)


def check_samples(samples: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Raises TypeError for a dataset of a user's that gives anything else."""
    for given in samples:
        if not isinstance(given, Tensor):
            raise TypeError(f"a sample is made of torch.Tensor, not of {type(given).__name__}")
    return samples


def check_data(config: Config, data: Data, model: Model) -> None:
    """Raises ConfigError for less than a batch to train or to validate on, or tokens that the model does not know."""
    samples, needed = len(data.train), config.train.global_batch
    if samples < needed:
        what = f"{hide_in_url(config.data.path)} gives {samples} samples to train on; train.global_batch is {needed}"
        raise config.error("data.path", what)
    if config.train.eval_every and data.eval is None:
        raise config.error("train.eval_every", f"is {config.train.eval_every}, but there is no data to validate on")
    if config.train.eval_every and data.eval is not None and len(data.eval) < config.train.micro_batch:
        what = f"is {config.train.eval_every}, but there are {len(data.eval)} samples to validate on"
        raise config.error("train.eval_every", f"{what}; train.micro_batch is {config.train.micro_batch}")
    if model.vocab_size is not None and data.vocab_size is not None and data.vocab_size > model.vocab_size:
        what = f"is {model.vocab_size}, but the tokens of data.name {config.data.name!r} go up to {data.vocab_size - 1}"
        raise config.error("model.vocab_size", what)


def make_policy(config: Config, shape: ModelShape, speeds: Speeds | None) -> Policy:
    parallel, (fewest, most) = config.parallel, config.scaling.workers
    return Policy(
        model=shape,
        wish=Wish(parallel.data, parallel.pipeline, parallel.tensor, fewest, most),
        micro_batches=config.train.micro_batches,
        last_step=config.train.steps,
        spares=config.scaling.spares,
        max_bad_steps=config.train.max_bad_steps,
        precision=config.train.precision,
        copies=config.redundancy.copies,
        mirror_every=config.redundancy.mirror_every,
        checkpoint_every=config.checkpoint.every_steps,
        max_checkpoint_failures=config.checkpoint.max_failures,
        rebalance=config.parallel.rebalance,
        profiled=speeds,
        slowed=slowed(config),
    )


def make_schedule(config: Config) -> partial[float]:
    """The learning rate of a step, for the controller, which has no torch."""
    train = config.train
    return partial(
        learning_rate, peak=train.learning_rate, warmup=train.warmup_steps, last=train.steps, schedule=train.schedule
    )


def controller_faults(config: Config) -> tuple[ControllerFault, ...]:
    """Of a step the controller knows only its end: any phase of it is when the one before has become visible."""
    return tuple(
        ControllerFault(key, fault.step, "step" if fault.phase in STEP_PHASES else fault.phase, fault.kind)
        for key, fault in zip(config.fault_keys(), config.faults, strict=True)
        if fault.target == CONTROLLER
    )


def emulated(config: Config) -> dict[str, Any]:
    """Fields of the event that tells of workers made slow; nothing where there are none."""
    emulate = config.emulate
    slow = {str(rank): factor for rank, factor in emulate.slowdown.items() if factor > 1}
    return {"slowdown": slow, "from_step": emulate.from_step, "to_step": emulate.to_step} if slow else {}


def resources(config: Config) -> dict[str, float]:
    """What one worker takes of Ray: a GPU or a CPU, and what the user adds."""
    device = {"GPU": 1.0} if config.scaling.use_gpu else {"CPU": 1.0}
    return {**device, **config.scaling.resources_per_worker}


def environment(config: Config) -> dict[str, str]:
    """Variables for the processes of the run: where they find evenkeel and the user's modules, and their threads.

    As many threads as a worker has CPUs, like Ray, unless the user's environment says otherwise.
    """
    threads = os.environ.get("OMP_NUM_THREADS") or str(max(1, int(resources(config).get("CPU", 1))))
    root = str(Path(__file__).resolve().parents[2])
    paths = [str(Path.cwd())]
    if root not in (sysconfig.get_path("purelib"), sysconfig.get_path("platlib")):
        # "platform" is for nodes that have the working directory of a Ray job, and not this machine's folders.
        paths = [root, *paths, "platform"]
    before = os.environ.get("PYTHONPATH")
    return {"OMP_NUM_THREADS": threads, "PYTHONPATH": os.pathsep.join([*paths, *([before] if before else [])])}


def first_layout(prepared: Prepared) -> Planned | Infeasible:
    """The layout that the run would begin with, if all workers asked for come."""
    policy = prepared.spec.policy
    device = prepared.spec.worker.device
    workers = [WorkerInfo(worker_id(n + 1), NodeId("any"), 0, device) for n in range(policy.wish.max_workers)]
    return plan_layout(workers, policy.wish, policy.model, policy.micro_batches, None)


def describe(prepared: Prepared) -> str:
    """What --dry-run prints."""
    planned = first_layout(prepared)
    parameters = sum(prod(p.shape) for layer in prepared.spec.policy.model.layers for p in layer.params)
    need = ", ".join(f"{prepared.need.total(name):g} {name}" for name in sorted(prepared.need.each))
    config = prepared.config
    lines = [
        f"run        {config.run.name} in {prepared.directory.url}",
        f"model      {config.model.name}, {parameters:,} parameters in {prepared.spec.policy.model.depth} layers",
        f"steps      {config.train.steps} of {config.train.global_batch} samples, "
        f"{config.train.micro_batches} micro-batches each",
        f"needs      {need} of Ray",
        f"layout     {planned.reason}",
        *([f"profile    {prepared.note}"] if prepared.note else []),
        *([f"emulation  {emulation_text(prepared.spec.emulated)}"] if prepared.spec.emulated else []),
    ]
    return "\n".join(lines)


def _model_blamed(config: Config, given: ModelSource | None) -> AbstractContextManager[None]:
    if given is None:
        return blamed(config, "model.name", repr(config.model.name))
    name = "the given Model" if isinstance(given, Model) else getattr(given, "__qualname__", repr(given))
    return blamed(config, "model", name, "Python")


@contextmanager
def blamed(config: Config, key: str, what: str, source: str = "") -> Iterator[None]:
    """Errors of building the model or the data become errors of the configuration, with the source that names it.

    Args:
        what: raised them.
        source: of the key; "": the configuration knows.
    """
    try:
        with without_secrets(config):
            yield
    except ConfigError as error:
        raise error if error.source or not error.key else config.error(error.key, error.problem) from None
    except Exception as error:  # the border to the user's own code, which may raise anything
        text = str(error).splitlines()[0] if str(error) else ""
        raise ConfigError(f"{what} raised {type(error).__name__}: {text}", key, source or config.source(key)) from error
