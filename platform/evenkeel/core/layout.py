"""Layouts: who computes which layers, cut how, on which micro-batches. And the groups that follow from one."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache, cached_property, lru_cache
from itertools import pairwise

from evenkeel.core.ids import NodeId, WorkerId
from evenkeel.core.model import ModelShape, Shard


@dataclass(frozen=True, slots=True)
class WorkerInfo:
    """What a worker says of itself when it is ready.

    Attributes:
        device: "cpu" or "cuda"; only workers of one kind of device can share a process group.
        kind: the device's model, such as "NVIDIA H200", for planning.
        memory: bytes of the device, on the CPU of its node; 0 if that is not known.
        visible_devices: CUDA_VISIBLE_DEVICES as Ray set it, "" on CPU.
        store_host, store_port: where its rendezvous store listens.
    """

    worker_id: WorkerId
    node_id: NodeId
    pid: int
    device: str = "cpu"
    kind: str = "cpu"
    memory: int = 0
    visible_devices: str = ""
    store_host: str = "127.0.0.1"
    store_port: int = 0


def slowed_kind(kind: str, factor: float) -> str:
    """What a device that is made slow (emulation) is taken for."""
    return f"{kind}-slowed-{factor:g}x"


@dataclass(frozen=True, slots=True)
class Stage:
    """Layers start to stop (half-open) of one pipeline, on `members` in order of their TP rank."""

    start: int
    stop: int
    members: tuple[WorkerId, ...]


@dataclass(frozen=True, slots=True)
class Pipeline:
    """A full copy of the model over its stages, and its share: micro-batches micro_start to micro_stop of each step."""

    stages: tuple[Stage, ...]
    micro_start: int
    micro_stop: int

    @property
    def share(self) -> int:
        return self.micro_stop - self.micro_start


@dataclass(frozen=True, slots=True)
class Place:
    """Where a worker stands: its global rank, and its indices of pipeline, stage and TP rank."""

    rank: int
    pipeline: int
    stage: int
    tp: int


@dataclass(frozen=True)
class Layout:
    """Pipelines of stages of TP members. Ranks count pipeline by pipeline, stage by stage, TP rank last.

    Layouts that follow one another mostly have the same stages with other members: what depends on the stages alone is
    kept for the next, as thousands of workers are planned for again at each change.
    """

    pipelines: tuple[Pipeline, ...]

    @property
    def tensor(self) -> int:
        """The TP degree, equal in all stages."""
        return len(self.pipelines[0].stages[0].members)

    @cached_property
    def members(self) -> tuple[WorkerId, ...]:
        """All workers, by rank."""
        return tuple(w for p in self.pipelines for s in p.stages for w in s.members)

    @cached_property
    def places(self) -> Mapping[WorkerId, Place]:
        return dict(zip(self.members, _places(self.shape), strict=True))

    @cached_property
    def shards(self) -> Mapping[WorkerId, Shard]:
        """What each worker holds."""
        return dict(zip(self.members, _shards(self.shape), strict=True))

    def shard(self, worker: WorkerId) -> Shard:
        """What the worker holds. Raises KeyError for a worker that has no place."""
        return self.shards[worker]

    @property
    def shape(self) -> "Shape":
        return tuple(tuple((s.start, s.stop, len(s.members)) for s in p.stages) for p in self.pipelines)

    @property
    def micro_batches(self) -> int:
        return sum(p.share for p in self.pipelines)


Shape = tuple[tuple[tuple[int, int, int], ...], ...]
"""Of each pipeline's stages: layers (start, stop) and how many members."""


@lru_cache(maxsize=8)
def _places(shape: Shape) -> tuple[Place, ...]:
    """By rank."""
    places: list[Place] = []
    for i, pipeline in enumerate(shape):
        for j, (_, _, members) in enumerate(pipeline):
            places += [Place(len(places) + k, i, j, k) for k in range(members)]
    return tuple(places)


@lru_cache(maxsize=8)
def _shards(shape: Shape) -> tuple[Shard, ...]:
    """By rank; of equal ones there is one object."""
    whole = cache(Shard)
    stages = (stage for pipeline in shape for stage in pipeline)
    return tuple(whole(start, stop, part, parts) for start, stop, parts in stages for part in range(parts))


def check_layout(layout: Layout, depth: int, micro_batches: int) -> None:
    """Raises ValueError if a layer, a micro-batch or a worker is there twice or not at all, or TP degrees differ."""
    expected = 0
    for i, pipeline in enumerate(layout.pipelines):
        if pipeline.micro_start != expected or pipeline.share < 0:
            raise ValueError(f"pipeline {i} begins at micro-batch {pipeline.micro_start}, not {expected}")
        expected = pipeline.micro_stop
        layer = 0
        for j, stage in enumerate(pipeline.stages):
            if stage.start != layer or stage.stop <= stage.start:
                raise ValueError(f"pipeline {i} stage {j} has layers {stage.start} to {stage.stop} after layer {layer}")
            if len(stage.members) != layout.tensor:
                raise ValueError(f"pipeline {i} stage {j} has {len(stage.members)} TP members, not {layout.tensor}")
            layer = stage.stop
        if layer != depth:
            raise ValueError(f"pipeline {i} ends at layer {layer} of {depth}")
    if expected != micro_batches:
        raise ValueError(f"shares add up to {expected} micro-batches, not {micro_batches}")
    if len(set(layout.members)) != len(layout.members):
        raise ValueError("a worker has two places")


@dataclass(frozen=True, slots=True)
class SyncGroup:
    """Who sums which gradients: `members`, in order of their pipelines, hold the same box of `params`.

    Attributes:
        name: the same in every worker and generation with this arrangement, such as "layers0-3.tp0".
        start, stop: the segment's layers; for a tied parameter the range that its home layer is.
        part: the TP rank.
        members: a worker may be there once though it uses a tied parameter in two layers.
        params: names of the parameters, in order.
    """

    name: str
    start: int
    stop: int
    part: int
    members: tuple[WorkerId, ...]
    params: tuple[str, ...]


def segments(layout: Layout) -> tuple[tuple[int, int], ...]:
    """Runs of layers (start, stop) that lie within one stage in every pipeline: the common refinement of the cuts."""
    cuts = sorted({s.start for p in layout.pipelines for s in p.stages} | {layout.pipelines[0].stages[-1].stop})
    return tuple(pairwise(cuts))


def sync_groups(layout: Layout, model: ModelShape) -> tuple[SyncGroup, ...]:
    """All groups that sum gradients, in the one order in which everybody issues them (design, rule 3).

    Untied parameters go by segment and TP rank; each tied parameter is a group of its own, of all its holders. The TP
    ranks of each follow one another, and the members that have the same index in them are the TP ranks of one place.
    """
    tied = set(model.tied())
    groups: list[SyncGroup] = []
    for start, stop in segments(layout):
        names = tuple(p.name for layer in model.layers[start:stop] for p in layer.params if p.name not in tied)
        if not names:
            continue
        for tp in range(layout.tensor):
            members = tuple(_holder(p, start).members[tp] for p in layout.pipelines)
            groups.append(SyncGroup(f"layers{start}-{stop}.tp{tp}", start, stop, tp, members, names))
    for name in model.tied():
        users = [
            i for i, layer in enumerate(model.layers) if name in layer.ties or any(p.name == name for p in layer.params)
        ]
        for tp in range(layout.tensor):
            holders = (_holder(p, i).members[tp] for p in layout.pipelines for i in users)
            members = tuple(dict.fromkeys(holders))
            groups.append(SyncGroup(f"tied.{name}.tp{tp}", users[0], users[0] + 1, tp, members, (name,)))
    return tuple(groups)


def _holder(pipeline: Pipeline, layer: int) -> Stage:
    return next(s for s in pipeline.stages if s.start <= layer < s.stop)
