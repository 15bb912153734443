"""The sums of the gradients over the pipelines, begun while the last micro-batch's backward pass still runs; and the
way back of the parameters, from their owners to everybody, which comes to its end in the first forward pass."""

import math
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from evenkeel.core.ids import WorkerId
from evenkeel.core.layout import Layout, SyncGroup
from evenkeel.engine.collective import Share
from evenkeel.engine.groups import Group, Pending
from evenkeel.engine.progress import Progress
from evenkeel.engine.seat import Seat
from evenkeel.engine.state import ShardState
from evenkeel.plan.copies import Copies, Ownership

SQUARED = 1 << 15
"""Elements whose squares are summed in float32: with a million that loses 4e-5 of the norm. The rest is float64."""


@dataclass(slots=True)
class _Bucket:
    """A unit of a sync group's ownership.

    Attributes:
        span: of the flat buffers.
        shares: who owns which part of it; None: everybody all of it.
        layer: index of the first layer with parameters in it, -1 for tied ones.
        waits_for: parameters whose gradients are not final yet, once the last backward pass has begun.
        handle: of the sum.
    """

    group: Group
    span: slice
    shares: tuple[Share, ...] | None
    params: tuple[str, ...]
    layer: int
    waits_for: int = 0
    handle: Pending | None = None


class GradientSums:
    """Sums this worker's gradients with the other holders', in the one order of groups that everybody keeps (rule 3).

    The order is that of the backward pass: segments from the last to the first, within one its layers from the last to
    the first, tied parameters at the end.

    A gradient is summed where its state is owned; where that is not everywhere, `publish` and `ready` give the others
    the owners' new parameters before the next step uses them.

    Args:
        copies: who owns what.
        group_of: the process group of a sync group with more than one member.
        tensor_group: over the TP ranks of this stage; None if the TP degree is 1.
    """

    def __init__(
        self,
        state: ShardState,
        layout: Layout,
        copies: Copies,
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
        self._squared: list[Tensor] = []
        self._buckets: list[_Bucket] = []
        counts = layout.places[worker].tp == 0
        for ownership in in_order(copies.groups):
            if worker in ownership.group.members:
                origin = state.span(ownership.group.params).start
                self._squared += self._counted(ownership, origin, worker, counts)
                if len(ownership.group.members) > 1:
                    self._buckets += self._cut(ownership, origin, group_of(ownership.group))
        self._by_param = {name: bucket for bucket in self._buckets for name in bucket.params}
        self._hooks: list[RemovableHandle] = []
        self._issued = 0
        self._published: deque[tuple[int, Pending]] = deque()

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

    def publish(self) -> None:
        """Begins to give everybody the parameters from their owners, in the one order of groups: the reverse of that of
        the sums, so tied ones first and then as a forward pass needs them. Nobody reads what is not `ready`."""
        for bucket in reversed(self._buckets):
            if bucket.shares is not None:
                # .data: autograd takes no notice. To it all parameters change, those in use by then, too.
                whole = self._state.compute.data[bucket.span]
                handle = bucket.group.gather_shares(whole, bucket.shares, async_op=True)
                self._published.append((bucket.layer, handle))

    def ready(self, upto: float = math.inf) -> None:
        """Waits until the parameters are there of the model's layers up to this one, which a forward pass comes to."""
        while self._published and self._published[0][0] <= upto:
            _, handle = self._published.popleft()
            with self._progress.communicating():
                handle.wait()

    def finish(self) -> None:
        """Starts what has not started, and waits for all; then the TP ranks take over one rank's gradients of what
        they all hold, so that their copies stay equal to the last bit. Parameters are there after it, too, even where
        no forward pass has waited for them (rule 3)."""
        self.detach()
        self.ready()
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
        parts = [torch.dot(part, part) for part in self._squared]
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
        tensor = self._state.grads[bucket.span]
        if bucket.shares is None:
            bucket.handle = bucket.group.all_reduce(tensor, async_op=True)
        else:
            bucket.handle = bucket.group.reduce_shares(tensor, bucket.shares, async_op=True)
        self._issued += 1

    def _cut(self, ownership: Ownership, origin: int, process_group: Group) -> Iterable[_Bucket]:
        """A group's units, the last layers first; the same in every member, as they hold the same regions."""
        everybody = self._state.shard.owned is None
        for start, stop in reversed(ownership.units):
            inside = [place for place in ownership.places if start <= place.start < stop]
            names = tuple(place.param.name for place in inside)
            shares = None if everybody else tuple(_shares(ownership, start, stop))
            span = slice(origin + start, origin + stop)
            yield _Bucket(process_group, span, shares, names, inside[0].layer)

    def _counted(
        self, ownership: Ownership, origin: int, worker: WorkerId, counts_replicated: bool
    ) -> Iterable[Tensor]:
        """Each element is counted by its first owner; what all TP ranks hold, by the first of them."""
        for part in ownership.parts:
            if part.owners[0] != worker:
                continue
            for region in self._state.regions:
                start, stop = max(region.start, origin + part.start), min(region.stop, origin + part.stop)
                if start < stop and (region.cut or counts_replicated):
                    yield from torch.split(self._state.grads[start:stop], SQUARED)


def _shares(ownership: Ownership, start: int, stop: int) -> Iterable[Share]:
    """The parts of a unit, counted from its first element, with ranks for owners."""
    rank = {worker: index for index, worker in enumerate(ownership.group.members)}
    for part in ownership.parts:
        if start <= part.start < stop:
            yield Share(part.start - start, part.stop - start, tuple(rank[worker] for worker in part.owners))


def in_order(groups: Sequence[Ownership]) -> list[Ownership]:
    """Sync groups in the order in which their sums are issued: as the backward pass finishes them, tied ones last."""
    untied = [ownership for ownership in groups if not ownership.group.name.startswith("tied.")]
    tied = [ownership for ownership in groups if ownership.group.name.startswith("tied.")]
    return [*reversed(untied), *tied]
