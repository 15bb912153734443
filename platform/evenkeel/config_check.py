"""What needs more than one value of a configuration to judge, without knowing the model or the data."""

import re
from math import prod

from evenkeel.config_schema import Config, FaultSection

PRECISIONS = ("fp32", "bf16", "fp64")
SCHEDULES = ("cosine", "linear", "constant")
STEP_PHASES = ("forward", "backward", "reduce", "before_vote", "after_vote", "commit")
MIRROR_PHASES = ("mirror", "exchange", "mirrored")
PHASES = (*STEP_PHASES, "save", "write", "written", *MIRROR_PHASES, "recovery", "load")
KINDS = ("kill", "stop", "segv", "exception", "flip")
LONGEST_NAME = 200


def check(config: Config) -> None:
    """Raises ConfigError for the first thing that is wrong."""
    _check_run(config)
    _check_train(config)
    _check_scaling(config)
    _check_emulation(config)
    _check_faults(config)


def _require(config: Config, holds: bool, key: str, problem: str) -> None:
    if not holds:
        raise config.error(key, problem)


def _check_run(config: Config) -> None:
    name = config.run.name
    _require(config, bool(name.strip()), "run.name", "a run needs a name, for example run.name=first")
    # A folder on a disk and a part of a URL, which fsspec splits at "::" and completes at "*", "?" and "[".
    plain = re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]*", name) is not None and len(name) <= LONGEST_NAME
    what = f"must be a plain name, without path separators: up to {LONGEST_NAME} letters, digits, _ and, within, . or -"
    _require(config, plain, "run.name", f"{_short(name)} {what}")
    _require(config, bool(config.run.storage_path.strip()), "run.storage_path", "must not be empty")
    _require(config, 0 <= config.run.seed < 2**64, "run.seed", f"is {config.run.seed}; expected 0 to 2**64 - 1")
    _require(config, config.run.orphan_minutes > 0, "run.orphan_minutes", "must be above 0")


def _short(name: str) -> str:
    return repr(name if len(name) <= 40 else f"{name[:37]}...")


def _check_train(config: Config) -> None:
    train = config.train
    for key in ("steps", "global_batch", "micro_batch", "max_bad_steps"):
        _require(config, getattr(train, key) > 0, f"train.{key}", f"is {getattr(train, key)}; must be at least 1")
    for key in ("weight_decay", "warmup_steps", "eval_every", "grad_clip"):
        _require(config, getattr(train, key) >= 0, f"train.{key}", f"is {getattr(train, key)}; must not be negative")
    _require(config, train.learning_rate > 0, "train.learning_rate", f"is {train.learning_rate}; must be above 0")
    divides = train.global_batch % train.micro_batch == 0
    batches = f"{train.micro_batch} does not divide train.global_batch {train.global_batch}"
    _require(config, divides, "train.micro_batch", batches)
    for key, names in (("precision", PRECISIONS), ("schedule", SCHEDULES)):
        value = getattr(train, key)
        _require(config, value in names, f"train.{key}", f"is {value!r}; expected one of {', '.join(names)}")


def _check_scaling(config: Config) -> None:
    workers, parallel = config.scaling.workers, config.parallel
    sane = len(workers) == 2 and 1 <= workers[0] <= workers[1]
    _require(config, sane, "scaling.workers", f"is {workers}; expected [fewest, most] with 1 <= fewest <= most")
    _require(config, config.scaling.spares >= 0, "scaling.spares", "must not be negative")
    for name, amount in config.scaling.resources_per_worker.items():
        _require(config, amount >= 0, f"scaling.resources_per_worker.{name}", f"is {amount}; must not be negative")
    degrees = {k: getattr(parallel, k) for k in ("data", "pipeline", "tensor")}
    for key, degree in degrees.items():
        _require(config, degree is None or degree > 0, f"parallel.{key}", f"is {degree}; must be at least 1, or null")
    asked = (parallel.data or 1) * (parallel.pipeline or 1) * (parallel.tensor or 1)
    said = config.said_last("scaling.workers", *(f"parallel.{k}" for k, d in degrees.items() if d is not None))
    product = f"data x pipeline x tensor = {asked} workers, but scaling.workers allows at most {workers[1]}"
    _require(config, asked <= workers[1], said, product)
    redundancy, checkpoint = config.redundancy, config.checkpoint
    _require(config, redundancy.copies is None or redundancy.copies > 0, "redundancy.copies", "must be at least 1")
    _require(config, redundancy.mirror_every >= 0, "redundancy.mirror_every", "must not be negative")
    _require(config, checkpoint.every_steps >= 0, "checkpoint.every_steps", "must not be negative")
    _require(config, checkpoint.keep > 0, "checkpoint.keep", "must be at least 1")
    failures = checkpoint.max_failures
    _require(config, failures is None or failures >= 0, "checkpoint.max_failures", "must not be negative")


def _most_workers(config: Config) -> int:
    """Places in the world at full strength."""
    parallel = config.parallel
    degrees = (parallel.data, parallel.pipeline, parallel.tensor)
    return config.scaling.workers[1] if None in degrees else prod(degree or 1 for degree in degrees)


def _check_emulation(config: Config) -> None:
    """A slowdown that can never be is a mistake."""
    emulate, workers, steps = config.emulate, _most_workers(config), config.train.steps
    for rank, factor in emulate.slowdown.items():
        key = f"emulate.slowdown.{rank}"
        _require(config, 0 <= rank < workers, key, f"there are only ranks 0 to {workers - 1}")
        _require(config, factor >= 1, key, f"is {factor}; a factor of at least 1 is expected")
    first, last = emulate.from_step, emulate.to_step
    what = f"is {first}; expected 1 to train.steps ({steps}), or null"
    _require(config, first is None or 1 <= first <= steps, "emulate.from_step", what)
    what = f"is {last}; expected a step from {first or 1} (emulate.from_step) on, or null"
    _require(config, last is None or last >= (first or 1), "emulate.to_step", what)


def _check_faults(config: Config) -> None:
    for i, fault in enumerate(config.faults):
        key = f"faults.{i}"
        last = config.train.steps
        _require(config, 1 <= fault.step <= last, f"{key}.step", f"is {fault.step}; expected 1 to train.steps ({last})")
        for name, valid in (("phase", PHASES), ("kind", KINDS)):
            value = getattr(fault, name)
            _require(config, value in valid, f"{key}.{name}", f"is {value!r}; expected one of {', '.join(valid)}")
        what, _, number = fault.target.partition(":")
        ok = fault.target in ("spare", "controller") or (what in ("rank", "stage") and number.isdecimal())
        expected = 'expected "rank:N", "stage:S", "spare" or "controller"'
        _require(config, ok, f"{key}.target", f"is {fault.target!r}; {expected}")
        _check_target(config, fault, key)


def _check_target(config: Config, fault: FaultSection, key: str) -> None:
    """A fault that can never fire is a mistake."""
    workers = _most_workers(config)
    what, _, number = fault.target.partition(":")
    if what == "rank":
        known = f"is {fault.target!r}, but there are only ranks 0 to {workers - 1}"
        _require(config, int(number) < workers, f"{key}.target", known)
    if what == "stage":
        stages = config.parallel.pipeline or config.scaling.workers[1]
        known = f"is {fault.target!r}, but there are only stages 0 to {stages - 1}"
        _require(config, int(number) < stages, f"{key}.target", known)
    if what == "controller" and fault.phase in ("save", *MIRROR_PHASES, "load"):
        raise config.error(f"{key}.phase", f"is {fault.phase!r}, but the controller holds no state to copy or to load")
    mirrors = fault.phase not in MIRROR_PHASES or config.redundancy.mirror_every > 0
    _require(config, mirrors, f"{key}.phase", f"is {fault.phase!r}, but redundancy.mirror_every is 0")
    if what == "spare" and fault.phase not in ("recovery", "load"):
        _require(config, config.scaling.spares > 0, f"{key}.target", "is 'spare', but scaling.spares is 0")
        idle = "is 'exception', but an idle spare runs no training code that could raise one"
        _require(config, fault.kind != "exception", f"{key}.kind", idle)
    if fault.kind == "flip":
        trains = what in ("rank", "stage") and fault.phase != "recovery"
        only = 'is "flip", which is for workers that train: target rank:N or stage:S, and no recovery'
        _require(config, trains, f"{key}.kind", only)
