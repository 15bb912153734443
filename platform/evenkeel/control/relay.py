"""One message per node: what the controller says to several workers of a node goes to one of them, which passes it on.

Messages in the one direction are grouped here; those in the other come as they are, several at once: see
Controller.several. A worker that passes messages on decides nothing. If it dies, what it had is as lost as any message:
whoever has not heard is found by a probe, and told again by itself (watch.py).
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from evenkeel.control import messages as m
from evenkeel.core.ids import NodeId, WorkerId

ToWorker = m.Abort | m.Settle | m.Form | m.Request | m.Probe


@dataclass(frozen=True, slots=True)
class ToNode:
    """Commands to workers of one node, in the order in which each of them is to hear its own.

    Those of one world or decision share it, so that it is written into the message once.
    """

    node_id: NodeId
    commands: tuple[ToWorker, ...]


def by_node(commands: Iterable[m.Command], node_of: Mapping[WorkerId, NodeId]) -> Iterator[ToNode | m.Command]:
    """The commands of an output, of which those to workers that follow one another are one message per node.

    All others stay where they are between them: what is to be durable before a worker is told of it still is.

    Args:
        node_of: of the workers that are alive. A command to anybody else is left as it is.
    """
    together: dict[NodeId, list[ToWorker]] = {}
    for command in commands:
        node = node_of.get(command.worker_id) if isinstance(command, ToWorker) else None
        if isinstance(command, ToWorker) and node is not None:
            together.setdefault(node, []).append(command)
            continue
        yield from _messages(together)
        together = {}
        yield command
    yield from _messages(together)


def _messages(together: Mapping[NodeId, list[ToWorker]]) -> Iterator[ToNode]:
    for node, commands in together.items():
        yield ToNode(node, tuple(commands))
