"""The sums of the gradients over the pipelines, begun while the last micro-batch's backward pass still runs."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from evenkeel.core.ids import WorkerId
from evenkeel.core.layout import Layout, SyncGroup, sync_groups
from evenkeel.core.model import ModelShape
from evenkeel.engine.groups import Group, Pending
from evenkeel.engine.progress import Progress
from evenkeel.engine.seat import Seat
from evenkeel.engine.state import Region, ShardState

BUCKET = 1 << 20
"""Elements that are summed in one go, at least: fewer cost too many round trips, more begin too late to overlap."""


@dataclass(slots=True)
class _Bucket:
    group: Group
    tensor: Tensor
    waits_for: int
    """Parameters whose gradients are not final yet, once the last backward pass has begun."""
    params: tuple[str, ...]
    handle: Pending | None = None


class GradientSums:
    """Sums this worker's gradients with the other holders', in the one order of groups that everybody keeps (rule 3).

    The order is that of the backward pass: segments from the last to the first, within one its layers from the last to
    the first, tied parameters at the end.

    Args:
        group_of: the process group of a sync group with more than one member.
        tensor_group: over the TP ranks of this stage; None if the TP degree is 1.
    """

    def __init__(
        self,
        state: ShardState,
        layout: Layout,
        shape: ModelShape,
        worker: WorkerId,
        group_of: Callable[[SyncGroup], Group],
        tensor_group: Group | None,
        seat: Seat,
        progress: Progress,
    ) -> None:
        self._state = state
        self._seat = seat
        self._progress = progress
        self._tensor_group = tensor_group
        self._replicated = [state.grads[r.span] for r in state.regions if not r.cut]
        self._shares: list[Tensor] = []
        self._buckets: list[_Bucket] = []
        counts = layout.places[worker].tp == 0
        for group in in_order(sync_groups(layout, shape)):
            if worker in group.members:
                self._shares += self._counted(group, worker, counts)
                if len(group.members) > 1:
                    self._buckets += self._cut(group, group_of(group))
        self._by_param = {name: bucket for bucket in self._buckets for name in bucket.params}
        self._hooks: list[RemovableHandle] = []
        self._issued = 0

    def begin(self) -> None:
        """A step begins."""
        self._issued = 0
        self._seat.begin_sums(len(self._buckets))
        for bucket in self._buckets:
            bucket.waits_for, bucket.handle = len(bucket.params), None

    def overlap(self) -> None:
        """The last backward pass begins: each sum starts as soon as its gradients, and those before it, are final."""
        for name, parameter in self._state.stage.named():
            bucket = self._by_param.get(name)
            if bucket is not None:
                hook = parameter.register_post_accumulate_grad_hook(self._counter(bucket))  # type: ignore[no-untyped-call]
                self._hooks.append(hook)

    def finish(self) -> None:
        """Starts what has not started, and waits for all; then the TP ranks take over one rank's gradients of what
        they all hold, so that their copies stay equal to the last bit."""
        self.detach()
        while self._issued < len(self._buckets):
            self._issue()
        for bucket in self._buckets:
            assert bucket.handle is not None
            with self._progress.communicating():
                bucket.handle.wait()
            self._seat.sum_done()
        if self._tensor_group is not None and self._replicated:
            packed = torch.cat(self._replicated)
            with self._progress.communicating():
                self._tensor_group.broadcast(packed, 0)
            sizes = [whole.numel() for whole in self._replicated]
            for part, whole in zip(torch.split(packed, sizes), self._replicated, strict=True):
                whole.copy_(part)

    def detach(self) -> None:
        """Takes the hooks off the parameters, which may outlive this generation."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def squares(self) -> float:
        """This worker's part of the squared norm of the summed gradients; not finite if one of its gradients is not."""
        parts = [torch.dot(share, share) for share in self._shares]
        return float(torch.stack(parts).double().sum()) if parts else 0.0

    # ------------------------------------------------------------ parts

    def _counter(self, bucket: _Bucket) -> Callable[[Tensor], None]:
        def final(_: Tensor) -> None:
            bucket.waits_for -= 1
            while self._issued < len(self._buckets) and self._buckets[self._issued].waits_for <= 0:
                self._issue()

        return final

    def _issue(self) -> None:
        bucket = self._buckets[self._issued]
        bucket.handle = bucket.group.all_reduce(bucket.tensor, async_op=True)
        self._issued += 1

    def _cut(self, group: SyncGroup, process_group: Group) -> Iterable[_Bucket]:
        """Buckets of a group, the last layers first; the same in every member, as they hold the same regions."""
        span = self._state.span(group.params)
        inside = [r for r in self._state.regions if span.start <= r.start < span.stop]
        gathered: list[Region] = []
        for region, before in zip(reversed(inside), [*reversed(inside[:-1]), None], strict=True):
            gathered.insert(0, region)
            size = gathered[-1].stop - gathered[0].start
            if before is None or (size >= BUCKET and before.layer != region.layer):
                names = tuple(name for r in gathered for name in r.names)
                yield _Bucket(process_group, self._state.grads[gathered[0].start : gathered[-1].stop], 0, names)
                gathered = []

    def _counted(self, group: SyncGroup, worker: WorkerId, counts_replicated: bool) -> Iterable[Tensor]:
        """Of each region its members count equal parts; what all TP ranks hold is counted by the first of them."""
        span = self._state.span(group.params)
        for region in self._state.regions:
            if span.start <= region.start < span.stop and (region.cut or counts_replicated):
                whole = self._state.grads[region.span]
                yield whole.tensor_split(len(group.members))[group.members.index(worker)]


def in_order(groups: Sequence[SyncGroup]) -> list[SyncGroup]:
    """Sync groups in the order in which their sums are issued: as the backward pass finishes them, tied ones last."""
    tied = [group for group in groups if group.name.startswith("tied.")]
    return [*reversed([group for group in groups if not group.name.startswith("tied.")]), *tied]
