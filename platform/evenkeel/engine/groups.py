"""Process groups of one generation: built together, broken together, from any thread at any time."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from evenkeel.core.ids import Generation, WorkerId
from evenkeel.core.layout import WorkerInfo
from evenkeel.engine.collective import Group, Op, Pending, SoloGroup
from evenkeel.engine.mesh import Mesh
from evenkeel.engine.rendezvous import GroupAborted, GroupBroken, StoreServer
from evenkeel.engine.tcp import TcpGroup
from evenkeel.engine.wire import Connection

__all__ = ["Group", "GroupAborted", "GroupBroken", "GroupSet", "GroupSpec", "Op", "Pending"]


@dataclass(frozen=True, slots=True)
class GroupSpec:
    """A group to build: a name that is unique within the generation, and its members by rank.

    Groups with the same members share their connections (and the order of their operations), unless one is
    `separate`: then its collectives may run at the same time as the others'.
    """

    name: str
    members: tuple[WorkerId, ...]
    separate: bool = False


Received = tuple[WorkerId, list[tuple[int, float]], bool]
"""From whom large messages came; of each its bytes and seconds, see wire.Connection; and whether isend sent them."""


class _Closable(Group, Protocol):
    def connect(self) -> None: ...

    def received(self) -> Iterable[Received]:
        """See GroupSet."""

    def abort(self) -> None:
        """Breaks what the mesh does not reach; does not block."""

    def close(self) -> None: ...


Make = Callable[[str, int, Sequence[WorkerInfo], Mesh], _Closable]


def communicator_for(members: Sequence[WorkerInfo]) -> Make:
    """NcclGroup where every member has a GPU of its own, TcpGroup elsewhere: NCCL refuses two ranks on one GPU.

    Without CUDA_VISIBLE_DEVICES nobody knows which of its node's GPUs a worker has, so that all count as the same one.
    """
    gpus = {(info.node_id, info.visible_devices) for info in members}
    if any(info.device != "cuda" for info in members) or len(gpus) < len(members):
        return TcpGroup
    from evenkeel.engine.nccl import NcclGroup

    return NcclGroup


class GroupSet:
    """The groups that one worker is in during one generation, and its group of everybody, `world`.

    `abort` may be called from any thread at any time, before `connect` and within it as well. Typical life:
    constructor, connect, use, abort or a last barrier, close.

    Args:
        members: everybody in the generation, by rank, with the addresses of their StoreServers.
        specs: all groups of the generation, the same list in the same order at every member.
        server: this worker's own.

    Raises:
        ValueError: if `me` is not a member, or a spec names somebody who is not or a name twice.
    """

    def __init__(
        self,
        generation: Generation,
        me: WorkerId,
        members: Sequence[WorkerInfo],
        specs: Sequence[GroupSpec],
        server: StoreServer,
    ) -> None:
        infos = {info.worker_id: info for info in members}
        names = [spec.name for spec in specs]
        if me not in infos or any(worker not in infos for spec in specs for worker in spec.members):
            raise ValueError(f"{me} or a group names a worker that is not in generation {generation}: {list(infos)}")
        if len(set(names)) != len(names) or "world" in names:
            raise ValueError(f"a group's name is there twice or is 'world': {names}")
        self.generation = generation
        self._me = me
        self._infos = infos
        self._rank = {worker: rank for rank, worker in enumerate(infos)}
        self._mesh = Mesh(generation, server)
        self._communicators: list[_Closable] = []
        self._groups: dict[str, Group] = {}
        make = communicator_for(members)
        shared: dict[tuple[WorkerId, ...], Group] = {}
        for spec in (GroupSpec("world", tuple(infos)), *specs):
            if me not in spec.members:
                continue
            group = None if spec.separate else shared.get(spec.members)
            if group is None:
                group = self._make(spec, me, infos, make)
                if not spec.separate:
                    shared[spec.members] = group
            self._groups[spec.name] = group

    def _make(self, spec: GroupSpec, me: WorkerId, infos: dict[WorkerId, WorkerInfo], make: Make) -> Group:
        if len(spec.members) == 1:
            return SoloGroup(spec.name, me)
        members = [infos[worker] for worker in spec.members]
        communicator = make(spec.name, spec.members.index(me), members, self._mesh)
        self._communicators.append(communicator)
        return communicator

    def __getitem__(self, name: str) -> Group:
        """Raises KeyError for a group that this worker is not in."""
        return self._groups[name]

    def received(self) -> Iterator[Received]:
        """What large messages have come in, in groups and from members, since this was asked last. Nothing over NCCL,
        where nobody sees it."""
        for communicator in self._communicators:
            yield from communicator.received()

    @property
    def world(self) -> Group:
        return self._groups["world"]

    @property
    def aborted(self) -> bool:
        return self._mesh.aborted

    def call(self, label: str, worker: WorkerId) -> Connection:
        """A connection of its own to another member, which claims it under the same label. Any thread may use it.

        Raises:
            GroupAborted: once the generation is aborted.
            GroupBroken: if that member cannot be reached.
        """
        return self._mesh.call(label, self._rank[self._me], self._rank[worker], self._infos[worker])

    def claim(self, label: str, worker: WorkerId) -> Connection:
        """The connection that another member calls under this label; blocks until it does. Raises GroupAborted."""
        return self._mesh.claim(label, self._rank[worker], self._infos[worker])

    def connect(self) -> None:
        """Meets the other members of every group, in the order of the list; blocks until they come.

        Raises:
            GroupAborted: as soon as `abort` is called, or if it was called before.
            GroupBroken: if a member cannot be reached or refuses.
        """
        try:
            for communicator in self._communicators:
                communicator.connect()
        except GroupBroken:
            self._mesh.cut()
            raise
        if self.aborted:
            raise GroupAborted(f"generation {self.generation} was aborted")

    def abort(self) -> None:
        """Breaks everything: who is blocked in an operation raises GroupAborted within milliseconds, and whoever tries
        one later; the other members find their connections closed. Idempotent; does not block."""
        self._mesh.abort()
        for communicator in self._communicators:
            communicator.abort()

    def close(self) -> None:
        """Aborts and frees sockets and threads. Called by the thread that uses the groups; may be called twice."""
        self.abort()
        for communicator in self._communicators:
            communicator.close()
        self._mesh.close()
