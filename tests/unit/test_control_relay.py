"""One message per node: fewer messages, and the same words in the same order for everybody."""

import pickle

from hypothesis import given
from hypothesis import strategies as st

from evenkeel.control import messages as m
from evenkeel.control.relay import ToNode, by_node
from evenkeel.core.ids import NodeId, Version, WorkerId

WORKERS = [WorkerId(f"w{i}") for i in range(6)]
NODE_OF = {worker: NodeId(f"n{i // 2}") for i, worker in enumerate(WORKERS[:5])}
DECISION = m.Decision(1, Version(1, 1), None, "a reason that is told once per message")

to_worker = st.builds(
    lambda worker, number: m.Probe(worker, 1, number) if number % 2 else m.Settle(worker, 1, number, DECISION),
    st.sampled_from(WORKERS),
    st.integers(0, 99),
)
others = st.builds(m.SetTimer, st.floats(0, 9))


def plain(messages: list[ToNode | m.Command]) -> list[m.Command]:
    return [c for message in messages for c in (message.commands if isinstance(message, ToNode) else (message,))]


@given(st.lists(to_worker | others, max_size=20))
def test_everybody_hears_the_same_in_the_same_order(commands: list[m.Command]) -> None:
    messages = list(by_node(commands, NODE_OF))
    heard = plain(messages)
    for worker in WORKERS:
        assert [c for c in heard if getattr(c, "worker_id", "") == worker] == [
            c for c in commands if getattr(c, "worker_id", "") == worker
        ]
    bounds = [i for i, c in enumerate(commands) if isinstance(c, m.SetTimer)]
    assert [i for i, c in enumerate(heard) if isinstance(c, m.SetTimer)] == bounds
    for start, stop in zip([0, *bounds], [*bounds, len(commands)], strict=True):
        assert sorted(map(repr, heard[start:stop])) == sorted(map(repr, commands[start:stop]))
    for message in messages:
        if isinstance(message, ToNode):
            assert {NODE_OF.get(c.worker_id) for c in message.commands} == {message.node_id}


def test_between_two_others_a_node_gets_one_message() -> None:
    settles = [m.Settle(worker, 1, 1, DECISION) for worker in WORKERS]
    messages = list(by_node([m.SetTimer(1.0), *settles], NODE_OF))
    nodes = [ToNode(NodeId(f"n{i}"), tuple(settles[2 * i : 2 * i + 2])) for i in range(2)]
    assert messages == [m.SetTimer(1.0), *nodes, ToNode(NodeId("n2"), (settles[4],)), settles[5]]


def test_what_a_message_shares_is_in_it_once() -> None:
    [message] = by_node([m.Settle(worker, 1, 1, DECISION) for worker in WORKERS[:2]], NODE_OF)
    assert pickle.dumps(message).count(DECISION.reason.encode()) == 1
