"""Measures a model on a cluster: some workers of each kind of node, started for it and ended after it."""

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from hashlib import blake2b
from itertools import combinations_with_replacement, product
from statistics import median
from typing import Any

from evenkeel import __version__
from evenkeel.config import Config, ConfigError
from evenkeel.config_values import hide_secrets
from evenkeel.core.codec import dump
from evenkeel.core.ids import NodeId
from evenkeel.core.layout import WorkerInfo
from evenkeel.core.model import ModelShape
from evenkeel.runtime.calls import ActorDead, last_line, reply
from evenkeel.runtime.cluster import Need, NoClusterError, NotEnoughError, given_address, ray_for
from evenkeel.runtime.look import check_shared, look
from evenkeel.runtime.names import worker_id
from evenkeel.runtime.prepare import Prepared, environment, prepare
from evenkeel.runtime.prober import Prober
from evenkeel.runtime.run import ADDRESS, versions
from evenkeel.store.profiles import (
    BETWEEN,
    INSIDE,
    DeviceRecord,
    Key,
    LinkRecord,
    ProfileRecord,
    TimesRecord,
)

LAYERS_S, LINK_S = 3.0, 1.5
"""For the layers at one TP degree, and for one link."""
START_S = 90.0
"""For the workers to start. Where all devices are taken they never do."""
MOST_KINDS = 16
"""Of nodes; of a cluster with more kinds the others are not measured."""
DEVICES = ("CPU", "GPU")


@dataclass(frozen=True, slots=True)
class _Probe:
    """A started worker, and what it said of itself."""

    actor: Any
    info: WorkerInfo
    outputs: tuple[int, ...]


def measure(prepared: Prepared) -> ProfileRecord:
    """Measures, on the given cluster or a local Ray, and writes profile.json into the run directory.

    Raises:
        ConfigError: it cannot be measured like this, or the model raised.
        StoreError: the run directory cannot be written.
    """
    check_shared(prepared.config)
    look(prepared)
    began = time.time()
    variables = environment(prepared.config)
    try:
        with ray_for(_need(prepared), variables) as used:
            record = _measure(prepared, {} if used.own else variables, began)
    except NotEnoughError as error:
        raise prepared.config.error("scaling.workers", str(error)) from None
    except NoClusterError as error:
        raise ConfigError(str(error), ADDRESS) from None
    prepared.directory.write_profile(record)
    return record


def prepare_to_measure(config: Config) -> Prepared:
    """The run without what is not to happen while it is measured."""
    return prepare(replace(config, faults=[]))


def profile_key(prepared: Prepared) -> Key:
    """What a profile of this run is of."""
    return key_of(prepared.config, prepared.spec.policy.model)


def key_of(config: Config, shape: ModelShape) -> Key:
    """What a profile of this model under this configuration is of."""
    said = {
        "model": [config.model.name, hide_secrets(config.model.options)],
        "data": [config.data.name, hide_secrets(config.data.options)],
        "shape": dump(shape, ModelShape),
        "train": [config.train.precision, config.train.micro_batch],
    }
    text = json.dumps(said, sort_keys=True, default=repr)
    return Key(
        model=config.model.name,
        precision=config.train.precision,
        micro_batch=config.train.micro_batch,
        layers=tuple(layer.name for layer in shape.layers),
        fingerprint=blake2b(text.encode(), digest_size=16).hexdigest(),
    )


def degrees(config: Config) -> tuple[int, ...]:
    """The TP degrees to measure."""
    return tuple(sorted({1, config.parallel.tensor or 1}))


# ---------------------------------------------------------------- who measures


def choose_nodes(nodes: Sequence[tuple[str, Mapping[str, float]]], each: Mapping[str, float], count: int) -> list[str]:
    """Ids of nodes, once for each worker: `count` on the first of each kind, if it has room, and one on the next.

    Args:
        nodes: ids and resources, by Ray's names. Those with the same resources are of one kind.
        each: what a worker takes.
    """
    kinds: dict[tuple[tuple[str, float], ...], list[str]] = {}
    for node, resources in nodes:
        room = Need(count, each).fits(resources)
        own = {k: v for k, v in resources.items() if k in (*DEVICES, *each) or k.startswith("accelerator_type:")}
        of_kind = kinds.setdefault(tuple(sorted(own.items())), [])
        if room and len({*of_kind}) < 2:
            of_kind += [node] * (1 if of_kind else room)
    return [node for found in list(kinds.values())[:MOST_KINDS] for node in found]


def _need(prepared: Prepared) -> Need:
    """Two workers, for a link, or as many as a TP group has; on one machine no more than there are GPUs."""
    count = max(2, *degrees(prepared.config))
    if prepared.config.scaling.use_gpu and given_address() is None:
        import torch

        count = max(1, min(count, torch.cuda.device_count()))
    return Need(count, prepared.need.each)


@contextmanager
def _probes(prepared: Prepared, env_vars: Mapping[str, str]) -> Iterator[list[_Probe]]:
    import ray
    from ray import cloudpickle
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    need = _need(prepared)
    alive = [node for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]
    places = choose_nodes([(node["NodeID"], node["Resources"]) for node in alive], need.each, need.count)
    if not places:
        each = ", ".join(f"{amount:g} {name}" for name, amount in sorted(need.each.items()))
        what = f"no node has room for a worker, which takes {each}"
        raise prepared.config.error("scaling.resources_per_worker", what)
    worker = replace(prepared.spec.worker, env_vars=env_vars)
    make = cloudpickle.dumps(prepared.maker)  # type: ignore[no-untyped-call]
    actor_class: Any = ray.remote(Prober)
    actors: list[Any] = []
    try:
        for number, node in enumerate(places):
            there = NodeAffinitySchedulingStrategy(node, soft=False)
            options = actor_class.options(scheduling_strategy=there, **worker.options())
            actors.append(options.remote(worker_id(number + 1), make, worker.device))
        about = [actor.about.remote() for actor in actors]
        _, missing = ray.wait(about, num_returns=len(about), timeout=START_S)
        if missing:
            what = f"{len(missing)} of {len(about)} workers did not start within {START_S:.0f} s"
            raise prepared.config.error("scaling.workers", f"{what}; are all devices in use?")
        yield [_Probe(actor, *reply(call)) for actor, call in zip(actors, about, strict=True)]
    finally:
        for actor in actors:
            ray.kill(actor)


# ---------------------------------------------------------------- what is measured


def _measure(prepared: Prepared, env_vars: Mapping[str, str], began: float) -> ProfileRecord:
    from ray.exceptions import RayTaskError

    key = profile_key(prepared)
    try:
        with _probes(prepared, env_vars) as probes:
            clubs = _Meetings(probes)
            kept, times = clubs.alone()
            for degree in degrees(prepared.config)[1:]:
                times += clubs.in_parallel(degree)
            links = clubs.links()
    except RayTaskError as error:
        raise prepared.config.error("model.name", f"could not be measured: {last_line(error)}") from None
    except ActorDead as error:
        raise prepared.config.error("model.name", f"could not be measured: a worker is lost: {error}") from None
    devices = {probe.info.kind: DeviceRecord(probe.info.kind, probe.info.memory) for probe in probes}
    return ProfileRecord(
        key=key,
        devices=tuple(devices[kind] for kind in sorted(devices)),
        times=tuple(times),
        links=tuple(links),
        kept_bytes=kept,
        output_bytes=probes[0].outputs,
        time=began,
        seconds=time.time() - began,
        versions=versions(__version__),
    )


class _Meetings:
    """Workers that measure together; each meeting has a number of its own."""

    def __init__(self, probes: Sequence[_Probe]) -> None:
        self._probes = probes
        self._number = 0

    def alone(self) -> tuple[tuple[int, ...], list[TimesRecord]]:
        """What layers keep, and their times, by kind of device: everybody at once, as in training."""
        calls = [probe.actor.layers.remote(0, (), LAYERS_S) for probe in self._probes]
        found = [reply(call) for call in calls]
        by_kind: dict[str, list[Any]] = {}
        for probe, layers in zip(self._probes, found, strict=True):
            by_kind.setdefault(probe.info.kind, []).append(layers)
        times = [_times(kind, 1, by_kind[kind]) for kind in sorted(by_kind)]
        return tuple(layer.kept_bytes for layer in found[0]), times

    def in_parallel(self, degree: int) -> list[TimesRecord]:
        """One TP group of each kind of device that has so many on a node."""
        groups: dict[tuple[str, NodeId], list[_Probe]] = {}
        for probe in self._probes:
            groups.setdefault((probe.info.kind, probe.info.node_id), []).append(probe)
        full = {kind: probes[:degree] for (kind, _), probes in groups.items() if len(probes) >= degree}
        calls = {kind: self._meet("layers", probes, LAYERS_S) for kind, probes in full.items()}
        return [_times(kind, degree, [reply(calls[kind][0])]) for kind in sorted(calls)]

    def links(self) -> list[LinkRecord]:
        """Between each two kinds of device, within a node and between nodes, where there are two that can."""
        found: list[LinkRecord] = []
        kinds = sorted({probe.info.kind for probe in self._probes})
        for pair, where in product(combinations_with_replacement(kinds, 2), (INSIDE, BETWEEN)):
            both = self._pair(pair, where)
            if both is not None:
                first, second = self._meet("link", both, LINK_S)
                reply(second)
                link = reply(first)
                found.append(LinkRecord((pair[0], pair[1]), where, link.bytes_per_s, link.latency_s))
        return found

    def _pair(self, kinds: tuple[str, ...], where: str) -> list[_Probe] | None:
        for one, other in product(self._probes, repeat=2):
            together = one.info.node_id == other.info.node_id
            if one is not other and (one.info.kind, other.info.kind) == kinds and together == (where == INSIDE):
                return [one, other]
        return None

    def _meet(self, method: str, probes: Sequence[_Probe], budget_s: float) -> list[Any]:
        self._number += 1
        members = tuple(probe.info for probe in probes)
        return [getattr(probe.actor, method).remote(self._number, members, budget_s) for probe in probes]


def _times(kind: str, degree: int, found: Sequence[Any]) -> TimesRecord:
    """The middle one of what several workers measured, layer by layer."""
    layers = [[layer.time for layer in same] for same in zip(*found, strict=True)]
    return TimesRecord(
        kind,
        degree,
        tuple(median(time.forward_s for time in times) for times in layers),
        tuple(median(time.backward_s for time in times) for times in layers),
    )
