"""What a process group does: the interface, and the group of one."""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Protocol

from torch import Tensor

from evenkeel.core.ids import WorkerId


class Op(Enum):
    """How an all-reduce combines."""

    SUM = "sum"
    MAX = "max"
    MIN = "min"


@dataclass(frozen=True, slots=True)
class Share:
    """Elements start to stop of a flat tensor, and the ranks that own them; the first one passes them on."""

    start: int
    stop: int
    owners: tuple[int, ...]


class Pending(Protocol):
    """A communication under way, or complete."""

    def wait(self) -> None:
        """Blocks until it is complete. Raises GroupAborted or GroupBroken; what it wrote to is undefined then."""

    def done(self) -> bool:
        """Whether `wait` would return, or raise, at once. A receive is never done before it is waited for."""


class Group(Protocol):
    """Some workers that communicate; every method is called from one thread (abort comes from outside, see GroupSet).

    All members issue the same collectives in the same order with tensors of the same size and type; two operations of
    one group never run at the same time. Messages (isend, irecv) between two members keep their order and are
    independent of the collectives. Without `async_op` a collective is complete when it returns. Tensors are contiguous.
    Ranks count within the group.

    Raises (all): GroupAborted once the generation is aborted, GroupBroken if a member is gone or sent something else.
    Then every group of the generation is useless, here and soon at every other member.
    """

    @property
    def name(self) -> str: ...

    @property
    def rank(self) -> int: ...

    @property
    def size(self) -> int: ...

    @property
    def members(self) -> tuple[WorkerId, ...]:
        """By rank."""

    def all_reduce(self, tensor: Tensor, op: Op = Op.SUM, async_op: bool = False) -> Pending:
        """Combines `tensor` over the ranks, in place and with the same bits on every rank."""

    def reduce_shares(self, tensor: Tensor, shares: Sequence[Share], async_op: bool = False) -> Pending:
        """Each share of the flat tensor becomes the sum over the ranks at its owners, with the same bits; made once, by
        the first of them. What is nobody's share, or not this rank's, is undefined after it.

        Args:
            shares: the same everywhere; no rank is the first owner of two.
        """

    def gather_shares(self, tensor: Tensor, shares: Sequence[Share], async_op: bool = False) -> Pending:
        """Everybody gets each share of the flat tensor from its first owner; its other owners have it already."""

    def broadcast(self, tensor: Tensor, src: int, async_op: bool = False) -> Pending: ...

    def barrier(self) -> None:
        """Returns once all members have come to it."""

    def isend(self, tensor: Tensor, dst: int) -> Pending:
        """The tensor may be overwritten after wait(), which never waits for the receiver to receive."""

    def irecv(self, tensor: Tensor, src: int) -> Pending:
        """The next message of `src`, of just this size."""

    def drain(self) -> None:
        """Blocks until no copy is held of anything that was sent: so whoever sends much bounds the memory for it."""


class Done:
    """A communication that was complete when it was issued."""

    def wait(self) -> None:
        pass

    def done(self) -> bool:
        return True


DONE = Done()


class SoloGroup:
    """A group of one: every collective is done before it begins."""

    rank = 0
    size = 1

    def __init__(self, name: str, me: WorkerId) -> None:
        self.name = name
        self.members = (me,)

    def all_reduce(self, tensor: Tensor, op: Op = Op.SUM, async_op: bool = False) -> Pending:
        return DONE

    def reduce_shares(self, tensor: Tensor, shares: Sequence[Share], async_op: bool = False) -> Pending:
        return DONE

    def gather_shares(self, tensor: Tensor, shares: Sequence[Share], async_op: bool = False) -> Pending:
        return DONE

    def broadcast(self, tensor: Tensor, src: int, async_op: bool = False) -> Pending:
        if src != 0:
            raise ValueError(f"rank {src} in a group of one")
        return DONE

    def barrier(self) -> None:
        pass

    def isend(self, tensor: Tensor, dst: int) -> Pending:
        raise ValueError("a group of one has nobody to send to")

    def irecv(self, tensor: Tensor, src: int) -> Pending:
        raise ValueError("a group of one has nobody to receive from")

    def drain(self) -> None:
        pass
