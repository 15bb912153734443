"""What a process group does: the interface, and the group of one."""

from enum import Enum
from typing import Protocol

from torch import Tensor

from evenkeel.core.ids import WorkerId


class Op(Enum):
    """How an all-reduce combines."""

    SUM = "sum"
    MAX = "max"
    MIN = "min"


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

    def reduce_scatter(self, output: Tensor, tensor: Tensor, async_op: bool = False) -> Pending:
        """output (n) = the sum over the ranks of tensor[rank * n : (rank + 1) * n] (size * n), both taken as flat."""

    def all_gather(self, output: Tensor, tensor: Tensor, async_op: bool = False) -> Pending:
        """output[p * n : (p + 1) * n] (flat) = rank p's tensor (n)."""

    def broadcast(self, tensor: Tensor, src: int, async_op: bool = False) -> Pending: ...

    def barrier(self) -> None:
        """Returns once all members have come to it."""

    def isend(self, tensor: Tensor, dst: int) -> Pending:
        """The tensor may be overwritten after wait(), which never waits for the receiver to receive."""

    def irecv(self, tensor: Tensor, src: int) -> Pending:
        """The next message of `src`, of just this size."""


class Done:
    """A communication that was complete when it was issued."""

    def wait(self) -> None:
        pass

    def done(self) -> bool:
        return True


DONE = Done()


class SoloGroup:
    """A group of one: collectives are copies."""

    rank = 0
    size = 1

    def __init__(self, name: str, me: WorkerId) -> None:
        self.name = name
        self.members = (me,)

    def all_reduce(self, tensor: Tensor, op: Op = Op.SUM, async_op: bool = False) -> Pending:
        return DONE

    def reduce_scatter(self, output: Tensor, tensor: Tensor, async_op: bool = False) -> Pending:
        output.view(-1).copy_(tensor.view(-1))
        return DONE

    def all_gather(self, output: Tensor, tensor: Tensor, async_op: bool = False) -> Pending:
        output.view(-1).copy_(tensor.view(-1))
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
