"""Measures a model on a cluster: some workers of each kind of node, started for it and ended after it."""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import combinations_with_replacement, product
from statistics import median
from typing import Any

from evenkeel import __version__
from evenkeel.config import Config, ConfigError
from evenkeel.core.ids import NodeId, WorkerId
from evenkeel.core.layout import WorkerInfo
from evenkeel.runtime.calls import ActorDead, last_line, reply
from evenkeel.runtime.cluster import Need, NoClusterError, NotEnoughError, given_address, ray_for
from evenkeel.runtime.look import check_shared, look
from evenkeel.runtime.names import worker_id
from evenkeel.runtime.prepare import Prepared, environment, prepare
from evenkeel.runtime.prober import Prober
from evenkeel.runtime.profiled import degrees, key_of, slowed
from evenkeel.runtime.run import ADDRESS, versions
from evenkeel.store.profiles import (
    BETWEEN,
    INSIDE,
    DeviceRecord,
    LinkRecord,
    ProfileRecord,
    TimesRecord,
)

LAYERS_S, LINK_S, LEAST_S = 2.0, 1.0, 0.3
"""For the layers at one TP degree and for one link, at most; and for each of them at least."""
IN_ALL_S = 18.0
"""From the start of a local Ray to the last measurement: where starting takes long, less is left for each of them."""
START_S = 90.0
"""For the workers to start. Where all devices are taken they never do."""
MOST_KINDS = 16
"""Of nodes; of a cluster with more kinds the others are not measured."""
DEVICES = ("CPU", "GPU")


@dataclass(frozen=True, slots=True)
class _Probe:
    """A started worker, the factor that it is slowed by, and what it said of itself."""

    actor: Any
    factor: float
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


def _factors(prepared: Prepared) -> list[float]:
    """Of the workers on a node: two as they are, for a link, or as many as a TP group has, then each way slowed."""
    together = max(degrees(prepared.config))
    slow = sorted({factor for _, factor in slowed(prepared.config)})
    return [1.0] * max(2, together) + [factor for factor in slow for _ in range(together)]


def _need(prepared: Prepared) -> Need:
    """What a local Ray is to have: on one machine no more than there are GPUs."""
    count = len(_factors(prepared))
    if prepared.config.scaling.use_gpu and given_address() is None:
        import torch

        count = max(1, min(count, torch.cuda.device_count()))
    return Need(count, prepared.need.each)


@contextmanager
def _probes(prepared: Prepared, env_vars: Mapping[str, str]) -> Iterator[list[_Probe]]:
    import ray
    from ray import cloudpickle
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    need, factors = _need(prepared), _factors(prepared)
    alive = [node for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]
    places = choose_nodes([(node["NodeID"], node["Resources"]) for node in alive], need.each, len(factors))
    if not places:
        each = ", ".join(f"{amount:g} {name}" for name, amount in sorted(need.each.items()))
        what = f"no node has room for a worker, which takes {each}"
        raise prepared.config.error("scaling.resources_per_worker", what)
    worker = replace(prepared.spec.worker, env_vars=env_vars)
    make = cloudpickle.dumps(prepared.maker)  # type: ignore[no-untyped-call]
    actor_class: Any = ray.remote(Prober)
    actors: list[Any] = []
    try:
        given = [factors[places[:number].count(node)] for number, node in enumerate(places)]
        for number, (node, factor) in enumerate(zip(places, given, strict=True)):
            there = NodeAffinitySchedulingStrategy(node, soft=False)
            options = actor_class.options(scheduling_strategy=there, **worker.options())
            actors.append(options.remote(worker_id(number + 1), make, worker.device, factor))
        about = [actor.about.remote() for actor in actors]
        _, missing = ray.wait(about, num_returns=len(about), timeout=START_S)
        if missing:
            what = f"{len(missing)} of {len(about)} workers did not start within {START_S:.0f} s"
            raise prepared.config.error("scaling.workers", f"{what}; are all devices in use?")
        yield [_Probe(a, f, *reply(call)) for a, call, f in zip(actors, about, given, strict=True)]
    finally:
        for actor in actors:
            ray.kill(actor)


# ---------------------------------------------------------------- what is measured


def _measure(prepared: Prepared, env_vars: Mapping[str, str], began: float) -> ProfileRecord:
    from ray.exceptions import RayTaskError

    key = key_of(prepared.config, prepared.spec.policy.model)
    try:
        with _probes(prepared, env_vars) as probes:
            deeper = degrees(prepared.config)[1:]
            clubs = _Meetings(probes, began, 1 + len(deeper))
            kept, times = clubs.alone()
            for degree in deeper:
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


LinkMeeting = tuple[tuple[str, str], str, WorkerId, WorkerId]
"""Kinds of device, INSIDE or BETWEEN, and who measures it."""


def link_rounds(workers: Sequence[WorkerInfo]) -> list[list[LinkMeeting]]:
    """Who measures which link with whom: each kind of link once, and in a round no node twice."""
    kinds = sorted({info.kind for info in workers})
    pending = list(product(combinations_with_replacement(kinds, 2), (INSIDE, BETWEEN)))
    rounds: list[list[LinkMeeting]] = []
    while pending:
        used: set[NodeId] = set()
        now: list[LinkMeeting] = []
        for pair, where in pending:
            free = [info for info in workers if info.node_id not in used]
            both = next(((a, b) for a, b in product(free, free) if _link(a, b) == (pair, where)), None)
            if both is not None:
                now.append(((pair[0], pair[1]), where, both[0].worker_id, both[1].worker_id))
                used |= {info.node_id for info in both}
        if not now:
            break  # of the others there are no two workers
        rounds.append(now)
        pending = [link for link in pending if link not in [(pair, where) for pair, where, *_ in now]]
    return rounds


def _link(a: WorkerInfo, b: WorkerInfo) -> tuple[tuple[str, str], str] | None:
    if a is b:
        return None
    return (a.kind, b.kind), INSIDE if a.node_id == b.node_id else BETWEEN


class _Meetings:
    """Workers that measure together; each meeting has a number of its own."""

    def __init__(self, probes: Sequence[_Probe], began: float, degrees: int) -> None:
        self._probes = probes
        self._number = 0
        self._end = began + IN_ALL_S
        self._rounds = link_rounds([probe.info for probe in probes if probe.factor == 1])
        self._left = degrees + len(self._rounds)

    def _budget_s(self, most_s: float) -> float:
        """For the next of what is left to be measured."""
        left_s = (self._end - time.time()) / max(1, self._left)
        self._left -= 1
        return max(LEAST_S, min(most_s, left_s))

    def alone(self) -> tuple[tuple[int, ...], list[TimesRecord]]:
        """What layers keep, and their times, by kind of device: everybody at once, as in training."""
        budget_s = self._budget_s(LAYERS_S)
        calls = [probe.actor.layers.remote(0, (), budget_s) for probe in self._probes]
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
        budget_s = self._budget_s(LAYERS_S)
        calls = {kind: self._meet("layers", probes, budget_s) for kind, probes in full.items()}
        return [_times(kind, degree, [reply(calls[kind][0])]) for kind in sorted(calls)]

    def links(self) -> list[LinkRecord]:
        """Between each two kinds of device, within a node and between nodes, where there are two that can.

        Links of different nodes are measured at once. A device that is made slow has the links that it has anyway.
        """
        probes = {probe.info.worker_id: probe for probe in self._probes}
        found: list[LinkRecord] = []
        for links in self._rounds:
            budget_s = self._budget_s(LINK_S)
            calls = [self._meet("link", [probes[one], probes[other]], budget_s) for _, _, one, other in links]
            for (kinds, where, *_), (first, second) in zip(links, calls, strict=True):
                reply(second)
                link = reply(first)
                found.append(LinkRecord(kinds, where, link.bytes_per_s, link.latency_s))
        return sorted(found, key=lambda record: (record.kinds, record.where == BETWEEN))

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
