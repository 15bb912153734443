"""One Ray actor that measures the device which it is given: the layers of a model, and links to others like it."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, TypeVar

from evenkeel.core.ids import Generation, NodeId, WorkerId
from evenkeel.core.layout import WorkerInfo, slowed_kind
from evenkeel.plan.hardware import Link

if TYPE_CHECKING:
    from evenkeel.engine.collective import Group
    from evenkeel.engine.profiling import LayerProfile

Found = TypeVar("Found")


class Prober:
    """Calls of several that meet are given one number, higher than those before, and the members that are to meet.

    Args:
        make: pickled worker_actor.Make, as for a worker.
        factor: that this device is made slow by (emulation); then it is of a kind of its own.
    """

    def __init__(self, worker_id: WorkerId, make: bytes, device: str, factor: float) -> None:
        # Not before: the driver, which knows this class too, is to import neither for its sake.
        import ray
        import torch
        from ray import cloudpickle

        from evenkeel.engine.allocator import keep_freed_memory
        from evenkeel.engine.rendezvous import StoreServer
        from evenkeel.engine.slowdown import Slowdown
        from evenkeel.engine.worker import worker_info

        logging.getLogger("ray").setLevel(logging.ERROR)
        keep_freed_memory()
        self._device = torch.device(device)
        self._job = cloudpickle.loads(make)(worker_id)
        self._server = StoreServer(ray.util.get_node_ip_address())  # type: ignore[no-untyped-call]
        node = NodeId(ray.get_runtime_context().get_node_id())
        info = worker_info(worker_id, node, self._device, self._server)
        self._info = replace(info, kind=slowed_kind(info.kind, factor)) if factor > 1 else info
        self._slowdown = Slowdown(factor, device=self._device)

    def about(self) -> tuple[WorkerInfo, tuple[int, ...]]:
        """Who it is, and how many bytes each layer hands on."""
        from evenkeel.engine.profiling import output_bytes

        return self._info, output_bytes(self._job)

    def layers(self, number: Generation, members: Sequence[WorkerInfo], budget_s: float) -> "tuple[LayerProfile, ...]":
        """With several members as their TP group."""
        from evenkeel.engine.profiling import measure_layers

        def measure(group: "Group | None") -> "tuple[LayerProfile, ...]":
            return measure_layers(self._job, self._device, budget_s, group, self._slowdown)

        return measure(None) if len(members) <= 1 else self._met(number, members, measure)

    def link(self, number: Generation, members: Sequence[WorkerInfo], budget_s: float) -> Link | None:
        """Between two members; told by the first."""
        from evenkeel.engine.links import measure_link

        return self._met(number, members, lambda both: measure_link(both, self._device, budget_s))

    def _met(self, number: Generation, members: Sequence[WorkerInfo], measure: "Callable[[Group], Found]") -> "Found":
        from evenkeel.engine.groups import GroupSet

        groups = GroupSet(number, self._info.worker_id, members, [], self._server)
        try:
            groups.connect()
            found = measure(groups.world)
            groups.world.barrier()  # nobody breaks a group that another one still reads from
            return found
        finally:
            groups.close()
