"""Collectives and messages between processes over TCP: what runs on CPU, or where several workers share a GPU.

Every collective is one or two rounds in which each member exchanges with each other directly, and sums are made in
the order of ranks: all ranks get the same bits, whatever the timing and however a tensor lies in memory. A round trip
is what small messages cost; large ones move as many bytes as in a ring, 2 (n - 1) / n of the tensor each way.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from evenkeel.core.ids import WorkerId
from evenkeel.core.layout import WorkerInfo
from evenkeel.engine.collective import DONE, Op, Pending, Share
from evenkeel.engine.lane import Lane, Work
from evenkeel.engine.mesh import Mesh
from evenkeel.engine.rendezvous import GroupAborted, GroupBroken
from evenkeel.engine.wire import Connection, Outbox, exchange, receive

WHOLE_BYTES = 256 * 1024
"""Up to this size everybody sends everything to everybody: one round instead of two."""

PIECE_BYTES = 32 * 1024 * 1024
"""Larger tensors are summed in pieces, which bounds the scratch memory. Smaller ones are slower (1 MB: by 35 %)."""

_COMBINE: dict[Op, Callable[..., Tensor]] = {Op.SUM: torch.add, Op.MAX: torch.maximum, Op.MIN: torch.minimum}


class TcpGroup:
    """See collective.Group, which it implements. Tensors on a GPU go through host memory."""

    def __init__(self, name: str, rank: int, members: Sequence[WorkerInfo], mesh: Mesh) -> None:
        self.name = name
        self.rank = rank
        self.size = len(members)
        self.members: tuple[WorkerId, ...] = tuple(info.worker_id for info in members)
        self._infos = tuple(members)
        self._mesh = mesh
        self._lane = Lane(name)
        self._peers: dict[int, Connection] = {}
        self._outboxes: dict[int, Outbox] = {}
        self._inboxes: dict[int, Connection] = {}
        self._posted: dict[int, list[_Receive]] = {}
        self._scratch = torch.empty(0, dtype=torch.uint8)
        self._broken = ""

    def connect(self) -> None:
        """Meets all members: the higher rank calls the lower one. Raises GroupAborted, GroupBroken."""
        for peer in range(self.rank):
            self._peers[peer] = self._mesh.call(self.name, self.rank, peer, self._infos[peer])
        for peer in range(self.rank + 1, self.size):
            self._peers[peer] = self._mesh.claim(self.name, peer, self._infos[peer])

    def abort(self) -> None:
        """The mesh does it all."""

    def close(self) -> None:
        """After the mesh is broken: ends the threads."""
        self._lane.close()
        for outbox in self._outboxes.values():
            outbox.flush()

    # ------------------------------------------------------------ collectives

    def all_reduce(self, tensor: Tensor, op: Op = Op.SUM, async_op: bool = False) -> Pending:
        return self._collective(partial(self._all_reduce, op=op), [tensor], [tensor], async_op)

    def reduce_shares(self, tensor: Tensor, shares: Sequence[Share], async_op: bool = False) -> Pending:
        return self._collective(partial(self._reduce_shares, shares=shares), [tensor], [tensor], async_op)

    def gather_shares(self, tensor: Tensor, shares: Sequence[Share], async_op: bool = False) -> Pending:
        return self._collective(partial(self._gather_shares, shares=shares), [tensor], [tensor], async_op)

    def broadcast(self, tensor: Tensor, src: int, async_op: bool = False) -> Pending:
        if not 0 <= src < self.size:
            raise ValueError(f"rank {src} in a group of {self.size}")
        return self._collective(partial(self._broadcast, src=src), [tensor], [tensor], async_op)

    def barrier(self) -> None:
        self.all_reduce(torch.zeros(1, dtype=torch.uint8))

    # ------------------------------------------------------------ messages

    def isend(self, tensor: Tensor, dst: int) -> Pending:
        self._guard(partial(self._send, _bytes(_on_host(tensor)), dst))
        return DONE

    def irecv(self, tensor: Tensor, src: int) -> Pending:
        self._check_peer(src)
        posted = self._posted.setdefault(src, [])
        posted.append(_Receive(self, tensor, src))
        return posted[-1]

    def drain(self) -> None:
        for outbox in self._outboxes.values():
            self._guard(outbox.drain)

    def take(self, wanted: "_Receive") -> None:
        """Receives into what was posted for that source, in order, up to `wanted`."""
        posted = self._posted[wanted.src]
        while not wanted.done():
            first = posted.pop(0)
            host = _on_host(first.tensor)
            self._guard(partial(self._receive, _bytes(host), first.src))
            first.finish(host)

    def received(self) -> Iterable[tuple[WorkerId, list[tuple[int, float]], bool]]:
        """See groups.GroupSet."""
        for connections, of_stages in ((self._peers, False), (self._inboxes, True)):
            for peer, connection in connections.items():
                if messages := connection.received():
                    yield self.members[peer], messages, of_stages

    # Connections for messages go one way and are made by the sender at its first message: most pairs never have one,
    # and a sender never waits for its receiver's program to get to that place.

    def _send(self, payload: memoryview, dst: int) -> None:
        if dst not in self._outboxes:
            self._check_peer(dst)
            label = f"{self.name}/to{dst}"
            self._outboxes[dst] = Outbox(self._mesh.call(label, self.rank, dst, self._infos[dst]))
        self._outboxes[dst].send(payload)

    def _receive(self, payload: memoryview, src: int) -> None:
        if src not in self._inboxes:
            self._inboxes[src] = self._mesh.claim(f"{self.name}/to{self.rank}", src, self._infos[src])
        receive(self._inboxes[src], payload)

    def _check_peer(self, peer: int) -> None:
        if peer == self.rank or not 0 <= peer < self.size:
            raise ValueError(f"a message between rank {self.rank} and rank {peer} in a group of {self.size}")

    # ------------------------------------------------------------ how they work

    def _collective(
        self, run: Callable[..., None], tensors: list[Tensor], written: list[Tensor], async_op: bool
    ) -> Pending:
        hosts = [_on_host(tensor) for tensor in tensors]
        operation = partial(self._guard, partial(run, *(host.view(-1) for host in hosts)))
        if async_op:
            work = self._lane.later(operation)
            return _Staged(work, written, hosts) if written[0].device.type != "cpu" else work
        self._lane.now(operation)
        _copy_back(written, hosts)
        return DONE

    def _guard(self, operation: Callable[[], None]) -> None:
        """Whoever fails cuts everything, so that nobody waits for what will not come; later operations fail at once."""
        if self._mesh.aborted:
            raise GroupAborted(f"group {self.name} was aborted")
        if self._broken:
            raise GroupBroken(self._broken)
        try:
            operation()
        except GroupBroken as error:
            self._broken = f"group {self.name}: {error}"
            self._mesh.cut()
            if self._mesh.aborted:
                raise GroupAborted(f"group {self.name} was aborted") from error
            raise GroupBroken(self._broken) from error

    def _all_reduce(self, x: Tensor, op: Op) -> None:
        if x.nbytes <= WHOLE_BYTES:
            self._reduce_whole(x, op)
            return
        piece = PIECE_BYTES // x.element_size()
        for start in range(0, x.numel(), piece):
            part = x[start : start + piece]
            chunks = self._chunks(part)
            self._reduce_chunks(chunks, chunks[self.rank], op)
            self._spread(chunks)

    def _reduce_whole(self, x: Tensor, op: Op) -> None:
        rows = self._rows(x.numel(), x.dtype)
        mine = _bytes(x)
        exchange(dict.fromkeys(self._peers.values(), mine), {c: _bytes(rows[p]) for p, c in self._peers.items()})
        self._combine(rows, x, x, op)

    def _reduce_shares(self, x: Tensor, shares: Sequence[Share]) -> None:
        held = self._held(x, shares)
        piece = max(1, PIECE_BYTES // (self.size * x.element_size()))
        for start in range(0, max(chunk.numel() for chunk in held), piece):
            chunks = [chunk[start : start + piece] for chunk in held]
            self._reduce_chunks(chunks, chunks[self.rank], Op.SUM)
        self._pass_on(held, {share.owners[0]: share.owners[1:] for share in shares})

    def _gather_shares(self, x: Tensor, shares: Sequence[Share]) -> None:
        everybody = range(self.size)
        others = {share.owners[0]: tuple(p for p in everybody if p not in share.owners) for share in shares}
        self._pass_on(self._held(x, shares), others)

    def _held(self, x: Tensor, shares: Sequence[Share]) -> list[Tensor]:
        """By rank the share that it is the first owner of; empty where it is of none."""
        held = [x[:0]] * self.size
        for share in shares:
            held[share.owners[0]] = x[share.start : share.stop]
        return held

    def _pass_on(self, chunks: Sequence[Tensor], to: Mapping[int, Sequence[int]]) -> None:
        """Each rank sends its chunk to those that `to` says."""
        mine = _bytes(chunks[self.rank])
        exchange(
            {self._peers[p]: mine for p in to.get(self.rank, ())},
            {self._peers[p]: _bytes(chunks[p]) for p, others in to.items() if self.rank in others},
        )

    def _broadcast(self, x: Tensor, src: int) -> None:
        if self.rank == src:
            exchange(dict.fromkeys(self._peers.values(), _bytes(x)), {})
        else:
            exchange({}, {self._peers[src]: _bytes(x)})

    def _reduce_chunks(self, chunks: Sequence[Tensor], output: Tensor, op: Op) -> None:
        """output = the combination over the ranks of chunks[my rank]; `output` may be that chunk itself."""
        mine = chunks[self.rank]
        rows = self._rows(mine.numel(), mine.dtype)
        exchange(
            {c: _bytes(chunks[p]) for p, c in self._peers.items()}, {c: _bytes(rows[p]) for p, c in self._peers.items()}
        )
        self._combine(rows, mine, output, op)

    def _spread(self, chunks: Sequence[Tensor]) -> None:
        """Everybody gets chunks[p] from rank p."""
        mine = _bytes(chunks[self.rank])
        exchange(dict.fromkeys(self._peers.values(), mine), {c: _bytes(chunks[p]) for p, c in self._peers.items()})

    def _combine(self, rows: list[Tensor], mine: Tensor, output: Tensor, op: Op) -> None:
        """output = rows combined in order, with `mine` as this rank's; `output` may be `mine`."""
        combine = _COMBINE[op]
        if self.rank < 2:
            rows[self.rank] = mine  # read before output is written to
        else:
            rows[self.rank].copy_(mine)
        combine(rows[0], rows[1], out=output)
        for row in rows[2:]:
            combine(output, row, out=output)

    def _rows(self, numel: int, dtype: torch.dtype) -> list[Tensor]:
        """Scratch: one row for each rank, each row aligned to 64 bytes."""
        stride = -(-numel * dtype.itemsize // 64) * 64
        if self._scratch.numel() < stride * self.size:
            self._scratch = torch.empty(stride * self.size, dtype=torch.uint8)
        starts = range(0, stride * self.size, stride) if stride else [0] * self.size
        return [self._scratch[start : start + numel * dtype.itemsize].view(dtype) for start in starts]

    def _chunks(self, x: Tensor) -> list[Tensor]:
        """Parts for the ranks, as equal as may be with 64-byte borders."""
        unit = max(1, 64 // x.element_size())
        each = -(-x.numel() // (self.size * unit)) * unit
        return [x[min(rank * each, x.numel()) : min((rank + 1) * each, x.numel())] for rank in range(self.size)]


class _Receive:
    """A posted receive; the bytes are taken from the socket when it, or one posted after it, is waited for."""

    def __init__(self, group: TcpGroup, tensor: Tensor, src: int) -> None:
        self.tensor, self.src = tensor, src
        self._group = group
        self._done = False

    def wait(self) -> None:
        if not self._done:
            self._group.take(self)

    def done(self) -> bool:
        return self._done

    def finish(self, host: Tensor) -> None:
        _copy_back([self.tensor], [host])
        self._done = True


class _Staged:
    """An operation on copies in host memory; `wait` brings the results back."""

    def __init__(self, work: Work, written: list[Tensor], hosts: list[Tensor]) -> None:
        self._work, self._written, self._hosts = work, written, hosts

    def wait(self) -> None:
        self._work.wait()
        _copy_back(self._written, self._hosts)

    def done(self) -> bool:
        return self._work.done()


def _copy_back(written: list[Tensor], hosts: list[Tensor]) -> None:
    for tensor, host in zip(written, hosts, strict=False):
        if tensor.device.type != "cpu":
            tensor.copy_(host)


def _on_host(tensor: Tensor) -> Tensor:
    """The tensor itself (without its history) if it is in host memory, else a copy there."""
    if not tensor.is_contiguous():
        raise ValueError(f"a contiguous tensor is needed, not shape {tuple(tensor.shape)} stride {tensor.stride()}")
    return tensor.detach().cpu()


def _bytes(tensor: Tensor) -> memoryview:
    array: Any = tensor.view(-1).view(torch.uint8).numpy()
    return memoryview(array)
