"""What `evenkeel simulate` was asked for, as settings of the goodput simulator."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from itertools import product
from math import prod
from pathlib import Path
from typing import Any

from evenkeel.config import load_config
from evenkeel.config_values import ConfigError, nearest_key
from evenkeel.core.model import LayerShape, ModelShape, ParamShape
from evenkeel.plan.hardware import DeviceKind
from evenkeel.sim.goodput.costs import Costs
from evenkeel.sim.goodput.outages import DAY_S, Drawn, Repair, Trace, TraceError, read_trace
from evenkeel.sim.goodput.setting import Failures, Setting
from evenkeel.tools.clusters import read_cluster
from evenkeel.tools.devices import published

SOURCE = "command line"
ALL, NONE = "all", "none"
AXES = {"spares": "--spares", "copies": "--copies", "mirror_every": "--mirror-every", "interval": "--interval"}
"""What can be swept, and by which option."""
PER_PIPELINE = 16
"""Micro-batches of each pipeline where nothing else is said."""
MOST_NODES, MOST_WORKERS, MOST_LAYERS = 100_000, 1_000_000, 10_000
MOST_STEPS, MOST_CHANGES, MOST_TOKENS, MOST_PRICE = 1e8, 1e6, 1e15, 1e9
"""More than these would take days to simulate, or all memory; whoever asks for more has mistyped a number."""
WIDTH = 64
"""What the widths of a model divide by of which only the number of parameters is known."""


@dataclass(frozen=True, slots=True)
class Trained:
    """A model and how it is trained at full strength; None where nobody has said it.

    Attributes:
        copies, mirror_every, interval: as in Setting (`interval` is checkpoint_every).
    """

    shape: ModelShape
    data: int | None = None
    pipeline: int | None = None
    tensor: int | None = None
    micro_batches: int | None = None
    tokens: float | None = None
    min_workers: int | None = None
    copies: int | None = None
    mirror_every: int = 0
    interval: int | None = 0
    workers: int | None = None
    precision: str = "bf16"

    def with_said(
        self, pipeline: int | None, tensor: int | None, micro_batches: int | None, tokens: float | None
    ) -> "Trained":
        """The same, but for what is said."""
        return replace(
            self,
            pipeline=self.pipeline if pipeline is None else pipeline,
            tensor=self.tensor if tensor is None else tensor,
            micro_batches=self.micro_batches if micro_batches is None else micro_batches,
            tokens=self.tokens if tokens is None else tokens,
        )


def of_config(paths: Sequence[Path]) -> Trained:
    """What a configuration says. Imports torch.

    Raises:
        ConfigError: for a configuration that no run would start with.
    """
    from evenkeel.engine.model import model_shape
    from evenkeel.runtime.job import make_model
    from evenkeel.runtime.prepare import blamed

    config = load_config(paths, ["run.name=simulated"])  # which it need not have
    with blamed(config, "model.name", repr(config.model.name)):
        shape = model_shape(make_model(config))
    length = config.model.options.get("seq_len")
    parallel, redundancy = config.parallel, config.redundancy
    return Trained(
        shape=shape,
        data=parallel.data,
        pipeline=parallel.pipeline,
        tensor=parallel.tensor,
        micro_batches=config.train.micro_batches,
        tokens=config.train.global_batch * length if isinstance(length, int) else None,
        min_workers=config.scaling.workers[0],
        copies=redundancy.copies,
        mirror_every=redundancy.mirror_every,
        interval=config.checkpoint.every_steps,
        workers=config.scaling.workers[1],
        precision=config.train.precision,
    )


def of_size(params: float, layers: int) -> Trained:
    """A model of which only the number of parameters and of equal layers is known.

    Raises:
        ConfigError: for less than one layer, or than one parameter a layer.
    """
    if not 1 <= layers <= MOST_LAYERS:
        raise bad("--layers", f"is {layers}; a model has at least 1, and no more than {MOST_LAYERS:,} are simulated")
    if not layers <= params < 1e18:
        raise bad("--params", f"is {params:g}; expected a number of parameters, such as 70e9")
    shape = (WIDTH, -(-round(params / layers) // WIDTH))
    names = [f"layers.{i}" for i in range(layers)]
    return Trained(ModelShape(tuple(LayerShape(n, (ParamShape(f"{n}.weight", shape, 0),)) for n in names), WIDTH))


@dataclass(frozen=True, slots=True)
class Nodes:
    """So many nodes at full strength, with so many devices each; how many of which kind, if that is known."""

    count: int
    devices: int
    kinds: tuple[tuple[DeviceKind, int], ...] = ()

    def slower(self, precision: str) -> dict[str, float]:
        """By kind, how many times as long as the fastest it takes, by what training reaches; empty for one kind alone.

        Raises:
            ConfigError: if a device has no peak for the precision.
        """
        reached = {kind.name: _reached(kind, precision) for kind, _ in self.kinds}
        best = max(reached.values(), default=0.0)
        return {name: best / flops for name, flops in reached.items()} if len(reached) > 1 else {}


def cluster(text: str | None, trained: Trained) -> Nodes:
    """Of "2048x8", or of what `evenkeel plan` takes; where nothing is said, the configuration's workers on a node each.

    Raises:
        ConfigError: for anything else, or nodes with different numbers of devices.
    """
    expected = "expected nodes at full strength x devices of each, such as 2048x8 or 2048x8xH100"
    if text is None:
        if trained.workers is None:
            raise bad("CLUSTER", f"is missing; {expected}")
        return Nodes(trained.workers, 1)
    if found := re.fullmatch(r"(\d{1,7})x(\d{1,4})", text):
        if not int(found[1]) or not int(found[2]):
            raise bad("CLUSTER", f"{text!r} has no devices; {expected}")
        return Nodes(int(found[1]), int(found[2]))
    try:
        nodes = read_cluster(text, published()).nodes
    except ConfigError as error:
        raise ConfigError(f"{error}; or nodes x devices of each, such as 2048x8") from None
    devices = {kind.devices for kind, _ in nodes}
    if len(devices) > 1:
        sizes = " and ".join(map(str, sorted(devices)))
        raise bad("CLUSTER", f"{text!r} has nodes of {sizes} devices; simulated are nodes with as many each")
    return Nodes(sum(count for _, count in nodes), devices.pop(), tuple((kind.device, count) for kind, count in nodes))


def _reached(kind: DeviceKind, precision: str) -> float:
    """FLOP/s. Raises ConfigError if the device has no peak for the precision."""
    if precision not in kind.flops:
        raise bad("CLUSTER", f"of {kind.name} no speed is known in {precision}")
    return kind.flops[precision] * kind.reached


def step_seconds(trained: Trained, nodes: Nodes) -> float | None:
    """Seconds of a step at full strength where nobody has said or measured it; None where the kind is not known either.

    6 FLOP for each parameter and token (Kaplan et al., "Scaling laws for neural language models", 2020, 2.1), at
    the share of the peak that training reaches.

    Raises:
        ConfigError: if the device has no peak for the precision.
    """
    if not nodes.kinds or trained.tokens is None:
        return None
    params = sum(prod(param.shape) for layer in trained.shape.layers for param in layer.params)
    reached = sum(count * nodes.devices * _reached(kind, trained.precision) for kind, count in nodes.kinds)
    return 6 * params * trained.tokens / reached


def numbers(option: str, text: str, word: str = "") -> tuple[int | None, ...]:
    """The values of an option that can be swept, such as "0,2,4,8"; `word` stands for None.

    Raises:
        ConfigError: for anything else, or a value given twice.
    """
    parts = [part.strip() for part in text.split(",")]
    for part in parts:
        if part != word and not (part.isascii() and part.isdecimal()):
            also = f" (or {word})" if word else ""
            raise bad(option, f"{part!r} is no whole number{also}; expected one, or several such as 0,2,4,8")
        if len(part) > 9 and part != word:
            raise bad(option, f"{part[:12]}{'...' * (len(part) > 12)} is more than can be simulated")
    values = tuple(None if part == word else int(part) for part in parts)
    if len(set(values)) < len(values):
        raise bad(option, f"{text!r} names a value twice")
    return values


def costs_with(costs: Costs, given: Sequence[str]) -> Costs:
    """Measured costs with some of them replaced by "key=seconds".

    Raises:
        ConfigError: for an unknown key, or a value that makes no sense.
    """
    known = [field.name for field in fields(Costs)]
    values: dict[str, float] = {}
    for text in given:
        key, _, value = text.partition("=")
        if key not in known:
            raise bad("--cost", f"{text!r}: unknown key {key!r}; nearest valid key: {nearest_key(key, known)}")
        try:
            values[key] = float(value)
        except ValueError:
            raise bad("--cost", f"{text!r}: {value!r} is no number; expected {key}=SECONDS") from None
    try:
        return replace(costs, **values)
    except ValueError as error:
        raise bad("--cost", str(error)) from None


def failures(per_node_day: float, repair_hours: float, rack: int, rack_share: float, trace: Path | None) -> Failures:
    """Raises ConfigError for numbers or a trace that make no sense."""
    try:
        if trace is not None:
            return read_trace(trace)
        return Drawn(per_node_day, Repair(3600 * repair_hours), rack, rack_share)
    except TraceError as error:
        raise ConfigError(str(error), "--trace", SOURCE) from None
    except ValueError as error:
        raise bad("failures", str(error)) from None


def base(
    trained: Trained,
    nodes: Nodes,
    failures: Failures,
    costs: Costs,
    *,
    step_s: float | None,
    duration_s: float,
    min_nodes: int | None,
    per_node: bool,
    price: float,
) -> Setting:
    """The setting without spares and what else is tried.

    Args:
        nodes: at full strength.
        step_s: None: as step_seconds has it.

    Raises:
        ConfigError: if something is missing or makes no sense.
    """
    devices = nodes.devices
    step_s = step_seconds(trained, nodes) if step_s is None else step_s
    if step_s is None:
        raise bad("--step-seconds", "is missing; or give --costs of a run, or the kind of device, as in 8x8xH100")
    if trained.tokens is None:
        raise bad("--tokens", "is missing: tokens of a step, such as 16e6")
    if trained.tokens > MOST_TOKENS:
        raise bad("--tokens", f"is {trained.tokens:g}; expected those of a step, such as 16e6")
    if price > MOST_PRICE:
        raise bad("--price", f"is {price:g}; expected that of a device for an hour, such as 2.5")
    if min_nodes is not None:
        trained = replace(trained, min_workers=min_nodes * devices)
    full = at_full_strength(trained, nodes.count, devices)
    names = failures.beginning if isinstance(failures, Trace) else node_names(nodes.count)
    slower = nodes.slower(trained.precision)
    if slower and isinstance(failures, Trace):
        raise bad("--trace", "does not say which kind a node is of; give a CLUSTER of one kind")
    of_nodes = (kind.name for kind, count in nodes.kinds for _ in range(count))
    _check_length(len(names), step_s, duration_s, failures)
    return setting_of(
        nodes=names,
        devices_per_node=devices,
        model=full.shape,
        data=full.data,
        pipeline=full.pipeline,
        tensor=full.tensor,
        micro_batches=full.micro_batches,
        min_workers=full.min_workers,
        step_s=step_s,
        tokens_per_step=trained.tokens,
        duration_s=duration_s,
        failures=failures,
        costs=costs,
        per_node=per_node,
        price_per_device_hour=price,
        kinds=dict(zip(names, of_nodes, strict=True)) if slower else {},
        slower=slower,
    )


def _check_length(nodes: int, step_s: float, duration_s: float, failures: Failures) -> None:
    """Raises ConfigError for what would be simulated for days."""
    if step_s > 0 and duration_s / step_s > MOST_STEPS:
        of = f"{duration_s:g} s of steps of {step_s:g} s are {duration_s / step_s:.3g} steps"
        raise bad("--days", f"{of}; no more than {MOST_STEPS:g} are simulated")
    if isinstance(failures, Drawn):
        changes = failures.expected_changes(nodes, duration_s)
        if changes > MOST_CHANGES:
            of = f"{failures.per_node_day:g} failures per node-day, repaired in {failures.repair.mean_s / 3600:g} h"
            what = f"take nodes away and back {changes:.3g} times"
            raise bad("--failures-per-node-day", f"{of}, {what}; no more than {MOST_CHANGES:g} are simulated")


def setting_of(**values: Any) -> Setting:
    """Raises ConfigError for values that make no sense."""
    try:
        return Setting(**values)
    except ValueError as error:
        raise bad("", str(error)) from None


def at_full_strength(trained: Trained, nodes: int, devices: int) -> Trained:
    """The same with all degrees: those that nobody has said fill the cluster, with the largest TP that a node allows.

    Raises:
        ConfigError: if the degrees do not fill the cluster, or do not fit the model.
    """
    workers, divides = nodes * devices, trained.shape.tensor_divides
    if nodes > MOST_NODES or workers > MOST_WORKERS:
        most = f"no more than {MOST_NODES:,} nodes and {MOST_WORKERS:,} devices are simulated"
        raise bad("CLUSTER", f"{nodes:,} nodes of {devices:,} devices; {most}")
    tensor = trained.tensor or max(t for t in range(1, devices + 1) if devices % t == 0 and divides % t == 0)
    pipeline = trained.pipeline or (max(1, workers // tensor // trained.data) if trained.data else 1)
    data = trained.data or workers // (tensor * pipeline)
    if data * pipeline * tensor != workers:
        makes = f"{data} pipelines of {pipeline} stages with TP {tensor} are {data * pipeline * tensor}"
        raise bad("CLUSTER", f"{nodes} nodes of {devices} devices are {workers} workers, but {makes}")
    if pipeline > trained.shape.depth:
        raise bad("--pipeline", f"is {pipeline}, but the model has only {trained.shape.depth} layers")
    batches = trained.micro_batches or PER_PIPELINE * data
    if batches < data:
        raise bad("--micro-batches", f"is {batches}, for {data} pipelines; each needs at least 1")
    least = trained.min_workers or pipeline * tensor
    return replace(trained, data=data, pipeline=pipeline, tensor=tensor, micro_batches=batches, min_workers=least)


def settings(base: Setting, axes: Mapping[str, Sequence[int | None]]) -> list[tuple[dict[str, int | None], Setting]]:
    """One for each combination of what is swept, with what was varied; the last axis varies fastest.

    The nodes of `base` are those without spares, of which each comes with a node more, unless there is a trace.
    """
    varied = [name for name in axes if len(axes[name]) > 1]
    found = []
    for values in product(*axes.values()):
        at = dict(zip(axes, values, strict=True))
        found.append(({name: at[name] for name in varied}, _varied(base, at)))
    return found


def _varied(base: Setting, at: Mapping[str, int | None]) -> Setting:
    changed: dict[str, Any] = {"checkpoint_every" if name == "interval" else name: v for name, v in at.items()}
    nodes = len(base.nodes) + (at["spares"] or 0)
    if nodes > MOST_NODES:
        raise bad("--spares", f"{at['spares']:,} make {nodes:,} nodes; no more than {MOST_NODES:,} are simulated")
    if not isinstance(base.failures, Trace):
        changed["nodes"] = node_names(nodes)
        if base.kinds:  # spares are of the kind that is named first
            changed["kinds"] = {**dict.fromkeys(changed["nodes"], next(iter(base.kinds.values()))), **base.kinds}
    return setting_of(**{field.name: getattr(base, field.name) for field in fields(base)} | changed)


def node_names(count: int) -> tuple[str, ...]:
    return tuple(f"node{i:05d}" for i in range(count))


def duration(days: float | None, failures: Failures) -> float:
    """Seconds to simulate: as given, else the trace's own length, else 30 days."""
    if days is not None:
        if not 0 < days < 1e5:
            raise bad("--days", f"is {days:g}; it must be above 0")
        return days * DAY_S
    return (failures.duration_s or DAY_S) if isinstance(failures, Trace) else 30 * DAY_S


def bad(option: str, problem: str) -> ConfigError:
    return ConfigError(problem, option, SOURCE)
