"""Process groups on GPUs: collectives of CUDA tensors by NCCL, the rest by TCP.

Written by PyTorch's source and never run: no machine with a GPU was at hand (tests/gpu/ has a test for one rank).
Messages do not go by NCCL: on one communicator they deadlock unless both sides issue them in matching order or in
groups, which neither a pipeline of unequal stages nor a transfer of state does. They go through host memory, and break
at once. Tensors in host memory are summed by TCP too.
"""

import threading
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.distributed.distributed_c10d import Store

from evenkeel.core.layout import WorkerInfo
from evenkeel.engine.collective import DONE, Op, Pending, Share
from evenkeel.engine.compat import nccl_backend, reduce_options
from evenkeel.engine.mesh import Mesh
from evenkeel.engine.rendezvous import GroupAborted
from evenkeel.engine.tcp import TcpGroup


class GroupStore(Store):
    """What NCCL needs of a store, over a group's messages: what rank 0 sets, the others get, in the same order.

    A get is freed by an abort like any other receive. Keep a reference as long as torch has one.
    """

    def __init__(self, group: TcpGroup) -> None:
        super().__init__()
        self._group = group
        self._values: dict[str, bytes] = {}

    def set(self, key: str, value: Any) -> None:
        self._values[key] = bytes(value)
        if self._group.rank == 0:
            content = torch.frombuffer(bytearray(value), dtype=torch.uint8)
            for peer in range(1, self._group.size):
                self._group.isend(torch.tensor([content.numel()]), peer)
                self._group.isend(content, peer)

    def get(self, key: str) -> bytes:
        """Raises GroupAborted, GroupBroken."""
        if key not in self._values:
            length = torch.empty(1, dtype=torch.int64)
            self._group.irecv(length, 0).wait()
            content = torch.empty(int(length), dtype=torch.uint8)
            self._group.irecv(content, 0).wait()
            self._values[key] = content.numpy().tobytes()
        return self._values[key]

    def check(self, keys: list[str]) -> bool:
        """Never waits."""
        return all(key in self._values for key in keys)


class NcclGroup(TcpGroup):
    """See collective.Group. Where that says that a collective of CUDA tensors is complete, it is so in the order of the
    current stream; the host does not wait for it. After an abort NCCL reports success: once the host has a result, look
    at GroupSet.aborted before using it (design, rule 2).
    """

    def __init__(self, name: str, rank: int, members: Sequence[WorkerInfo], mesh: Mesh) -> None:
        super().__init__(name, rank, members, mesh)
        self._store = GroupStore(self)
        self._backend: Any = None
        self._aborting: threading.Thread | None = None

    def connect(self) -> None:
        """Also ties the communicator to the current CUDA device."""
        super().connect()
        self._backend = nccl_backend(
            self._store, self.rank, self.size, torch.device("cuda", torch.cuda.current_device())
        )
        if self._mesh.aborted:  # the abort may have come before there was anything to abort
            self.abort()
            raise GroupAborted(f"group {self.name} was aborted")

    def abort(self) -> None:
        """In a thread: NCCL may wait there for other communicators, and all are to be aborted together."""
        if self._backend is not None and self._aborting is None:
            self._aborting = threading.Thread(
                target=self._backend.abort, name=f"evenkeel-abort-{self.name}", daemon=True
            )
            self._aborting.start()

    def close(self) -> None:
        super().close()
        if self._aborting is not None:
            self._aborting.join()
        self._backend = None

    def all_reduce(self, tensor: Tensor, op: Op = Op.SUM, async_op: bool = False) -> Pending:
        if tensor.device.type == "cpu":
            return super().all_reduce(tensor, op, async_op)
        return self._queue(partial(self._backend.allreduce, [tensor], reduce_options(op.value)), async_op)

    def reduce_shares(self, tensor: Tensor, shares: Sequence[Share], async_op: bool = False) -> Pending:
        """With several owners all ranks get the sum: NCCL has no quicker way to the same bits at some of them."""
        if tensor.device.type == "cpu":
            return super().reduce_shares(tensor, shares, async_op)
        if any(len(share.owners) > 1 for share in shares):
            return self.all_reduce(tensor, Op.SUM, async_op)
        x = tensor.view(-1)
        return self._queue_all(
            [partial(self._backend.reduce, x[s.start : s.stop], s.owners[0]) for s in shares], async_op
        )

    def gather_shares(self, tensor: Tensor, shares: Sequence[Share], async_op: bool = False) -> Pending:
        if tensor.device.type == "cpu":
            return super().gather_shares(tensor, shares, async_op)
        x = tensor.view(-1)
        return self._queue_all(
            [partial(self._backend.broadcast, x[s.start : s.stop], s.owners[0]) for s in shares], async_op
        )

    def broadcast(self, tensor: Tensor, src: int, async_op: bool = False) -> Pending:
        if tensor.device.type == "cpu":
            return super().broadcast(tensor, src, async_op)
        return self._queue(partial(self._backend.broadcast, tensor, src), async_op)

    def _queue(self, issue: Callable[[], Any], async_op: bool) -> Pending:
        return self._queue_all([issue], async_op)

    def _queue_all(self, issues: Sequence[Callable[[], Any]], async_op: bool) -> Pending:
        if self._mesh.aborted:
            raise GroupAborted(f"group {self.name} was aborted")
        pending = _StreamWork([issue() for issue in issues], self)
        if async_op:
            return pending
        pending.wait()
        return DONE

    @property
    def aborted(self) -> bool:
        return self._mesh.aborted


class _StreamWork:
    def __init__(self, works: Sequence[Any], group: NcclGroup) -> None:
        self._works, self._group = works, group

    def wait(self) -> None:
        """The current stream waits for it. Raises GroupAborted."""
        for work in self._works:
            if not self._group.aborted:
                work.wait()
        if self._group.aborted:
            raise GroupAborted(f"group {self._group.name} was aborted")

    def done(self) -> bool:
        return all(work.is_completed() for work in self._works)
