"""Process groups between real processes: results against dumb ones, and every way of breaking them."""

import os
import socket
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.distributed as dist
from processes import Child, Line, children

from evenkeel.core.ids import NodeId, WorkerId
from evenkeel.core.layout import WorkerInfo
from evenkeel.engine import tcp
from evenkeel.engine.collective import Share
from evenkeel.engine.groups import GroupAborted, GroupBroken, GroupSet, GroupSpec, Op, communicator_for
from evenkeel.engine.nccl import GroupStore, NcclGroup
from evenkeel.engine.rendezvous import StoreServer

SIZES = (1, 7, 64 * 1024 + 3, 300_005)
"""Elements of 4 bytes: far below, just below and above what is sent whole, none of them round."""


class Peer:
    """A worker as these tests need it: commands come over its line, and blocking ones run in a training thread."""

    def __init__(self, line: Line, rank: int) -> None:
        self.line, self.rank = line, rank
        self.server = StoreServer("127.0.0.1")
        self.groups: GroupSet | None = None
        self.error: BaseException | None = None
        self.thread: threading.Thread | None = None
        self.raised_at = 0.0

    def info(self) -> WorkerInfo:
        return WorkerInfo(name(self.rank), NodeId("n0"), os.getpid(), store_port=self.server.port)

    def make(self, generation: int, infos: Sequence[WorkerInfo], specs: Sequence[GroupSpec]) -> GroupSet:
        self.groups = GroupSet(generation, name(self.rank), infos, specs, self.server)
        return self.groups

    def start(self, function: Callable[[], Any]) -> None:
        """Runs it in the training thread; `finish` tells how it ended."""

        def run() -> None:
            self.error = None
            try:
                function()
            except BaseException as error:
                self.error, self.raised_at = error, time.perf_counter()

        self.thread = threading.Thread(target=run)
        self.thread.start()

    def abort(self) -> tuple[str, float]:
        """The error that the blocked training thread raised, and how many seconds after the abort."""
        assert self.groups is not None
        assert self.thread is not None
        began = time.perf_counter()
        self.groups.abort()
        self.thread.join()
        return type(self.error).__name__, self.raised_at - began


def name(rank: int) -> WorkerId:
    return WorkerId(f"w{rank}")


def serve(line: Line, rank: int) -> None:
    """Runs functions of this module on this worker's Peer: the test sends (function, *arguments)."""
    peer = Peer(line, rank)
    line.send(peer.info())
    while True:
        function, *arguments = line.receive()
        line.send(function(peer, *arguments))


def ask_all(peers: Sequence[Child], *message: Any) -> list[Any]:
    for peer in peers:
        peer.send(message)
    return [peer.receive() for peer in peers]


def connect(peer: Peer, generation: int, infos: Sequence[WorkerInfo], specs: Sequence[GroupSpec] = ()) -> None:
    peer.make(generation, infos, specs).connect()


# ---------------------------------------------------------------- results


def values(rank: int, count: int, dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(rank)
    if dtype.is_floating_point:
        return torch.randn(count, generator=generator, dtype=torch.float64).to(dtype)
    return torch.randint(-100, 100, (count,), generator=generator).to(dtype)


def check_collectives(peer: Peer, count: int, dtype: torch.dtype) -> None:
    """Against what each rank computes alone from everybody's seed; sums in the order of ranks, so to the last bit."""
    assert peer.groups is not None
    group = peer.groups.world
    size, rank = group.size, group.rank
    everybody = [values(r, count, dtype) for r in range(size)]
    for op, combine in ((Op.SUM, torch.add), (Op.MAX, torch.maximum), (Op.MIN, torch.minimum)):
        expected = everybody[0]
        for other in everybody[1:]:
            expected = combine(expected, other)
        tensor = values(rank, count, dtype)
        group.all_reduce(tensor, op)
        assert torch.equal(tensor, expected), (op, count, dtype)
    for src in range(size):
        tensor = values(rank, count, dtype)
        group.broadcast(tensor, src)
        assert torch.equal(tensor, everybody[src])
    expected = everybody[0]
    for other in everybody[1:]:
        expected = expected + other
    for shares in share_outs(count, size):
        tensor = values(rank, count, dtype)
        group.reduce_shares(tensor, shares)
        for share in shares:
            if rank in share.owners:
                assert torch.equal(tensor[share.start : share.stop], expected[share.start : share.stop]), share
            else:
                tensor[share.start : share.stop] = 0
        group.gather_shares(tensor, shares)
        assert torch.equal(tensor, expected), shares
    group.barrier()


def share_outs(count: int, size: int) -> list[list[Share]]:
    """Unequal shares, with one to all owners each, first owners in any order; and fewer shares than ranks."""
    cuts = [count * i * i // (size * size) for i in range(size + 1)]
    found = [
        [Share(cuts[i], cuts[i + 1], tuple((size - 1 - i + k) % size for k in range(r))) for i in range(size)]
        for r in range(1, size + 1)
    ]
    return [*found, [Share(0, count, (size - 1,))]]


def set_piece(_: Peer, count: int) -> None:
    """So that a tensor that is quick to check has several pieces."""
    tcp.PIECE_BYTES = count


def check_messages(peer: Peer) -> None:
    """Each to each at the same time, sends first: more than sockets hold, several in flight, order kept."""
    assert peer.groups is not None
    group = peer.groups.world
    counts = (4 * 1024 * 1024, 3, 0, 100_000)
    others = [r for r in range(group.size) if r != group.rank]
    for dst in others:
        for i, count in enumerate(counts):
            tensor = values(1000 * group.rank + 10 * dst + i, count, torch.float32)
            group.isend(tensor, dst).wait()
            tensor.zero_()
    for src in others:
        tensors = [torch.empty(count) for count in counts]
        pending = [group.irecv(tensor, src) for tensor in tensors]
        pending[-1].wait()
        for i, (count, tensor) in enumerate(zip(counts, tensors, strict=True)):
            assert torch.equal(tensor, values(1000 * src + 10 * group.rank + i, count, torch.float32))
    group.barrier()


def check_overlap(peer: Peer) -> None:
    """Sums issued ahead in two groups, waited for in another order, with collectives and messages between."""
    assert peer.groups is not None
    groups = (peer.groups.world, peer.groups["again"])
    size, rank = groups[0].size, groups[0].rank
    tensors = [torch.full((100_000 + i,), float(rank + i)) for i in range(6)]
    works = [groups[i % 2].all_reduce(tensor, async_op=True) for i, tensor in enumerate(tensors)]
    groups[0].isend(torch.tensor([float(rank)]), (rank + 1) % size)
    got, direct = torch.empty(1), torch.ones(3)
    groups[0].irecv(got, (rank - 1) % size).wait()
    groups[0].all_reduce(direct)
    for work in reversed(works):
        work.wait()
        assert work.done()
    assert got.item() == (rank - 1) % size
    assert torch.equal(direct, torch.full((3,), float(size)))
    for i, tensor in enumerate(tensors):
        assert torch.equal(tensor, torch.full_like(tensor, sum(r + i for r in range(size))))


@pytest.mark.parametrize("size", [2, 3, 4])
def test_collectives_give_what_a_loop_over_the_ranks_gives(size: int) -> None:
    with children(serve, size) as peers:
        infos = [peer.receive() for peer in peers]
        members = tuple(info.worker_id for info in infos)
        ask_all(peers, connect, 1, infos, (GroupSpec("again", members, separate=True),))
        for count in SIZES:
            ask_all(peers, check_collectives, count, torch.float32)
        ask_all(peers, set_piece, 400_000)
        ask_all(peers, check_collectives, SIZES[-1], torch.float32)
        for dtype in (torch.float64, torch.bfloat16, torch.int64, torch.uint8):
            ask_all(peers, check_collectives, 70_001, dtype)
        ask_all(peers, check_messages)
        ask_all(peers, check_overlap)


def test_a_group_of_one_copies() -> None:
    server = StoreServer()
    groups = GroupSet(1, name(0), [WorkerInfo(name(0), NodeId("n0"), 1)], [GroupSpec("tp", (name(0),))], server)
    groups.connect()
    tensor = torch.arange(3.0)
    groups.world.all_reduce(tensor, async_op=True).wait()
    groups.world.broadcast(tensor, 0).wait()
    groups["tp"].reduce_shares(tensor, [Share(0, 3, (0,))])
    groups["tp"].gather_shares(tensor, [Share(0, 3, (0,))])
    assert torch.equal(tensor, torch.arange(3.0))
    groups.world.barrier()
    with pytest.raises(ValueError, match="nobody to send to"):
        groups.world.isend(tensor, 0)
    groups.close()
    server.close()


def check_sharing(peer: Peer) -> None:
    assert peer.groups is not None
    groups = peer.groups
    assert groups["dp"] is groups.world
    assert groups["tp"] is groups["tied"]
    assert groups["alone"] is not groups["tp"]
    assert groups["tp"].members == ((name(0), name(1)) if peer.rank < 2 else (name(2), name(3)))
    tensor = torch.ones(2)
    for group in ("dp", "tp", "alone"):
        groups[group].all_reduce(tensor)
    assert tensor.tolist() == [16.0, 16.0]
    with pytest.raises(KeyError):
        groups["left" if peer.rank >= 2 else "right"]


def test_groups_with_equal_members_share_their_connections_unless_told_otherwise() -> None:
    with children(serve, 4) as peers:
        infos = [peer.receive() for peer in peers]
        world, left, right = (tuple(map(name, ranks)) for ranks in (range(4), (0, 1), (2, 3)))
        both = [GroupSpec("dp", world), GroupSpec("left", left), GroupSpec("right", right)]
        own = [[*both, GroupSpec("tp", p), GroupSpec("tied", p), GroupSpec("alone", p, True)] for p in (left, right)]
        for rank, peer in enumerate(peers):
            peer.send((connect, 1, infos, own[rank // 2]))
        for peer in peers:
            peer.receive()
        ask_all(peers, check_sharing)


@pytest.mark.parametrize(
    ("me", "specs", "text"),
    [
        ("w9", [], "not in generation"),
        ("w0", [GroupSpec("a", (name(0), name(9)))], "not in generation"),
        ("w0", [GroupSpec("a", (name(0),)), GroupSpec("a", (name(0),))], "there twice"),
        ("w0", [GroupSpec("world", (name(0),))], "there twice"),
    ],
)
def test_refuses_specs_that_make_no_sense(me: str, specs: list[GroupSpec], text: str) -> None:
    server = StoreServer()
    with pytest.raises(ValueError, match=text):
        GroupSet(1, WorkerId(me), [WorkerInfo(name(0), NodeId("n0"), 1)], specs, server)
    server.close()


# ---------------------------------------------------------------- breaking


def run_forever(peer: Peer, kind: str, count: int) -> None:
    """One communication after another, in the training thread, until it breaks; says so when the first is through."""
    assert peer.groups is not None
    group = peer.groups.world
    tensor = torch.ones(count)
    last = group.size - 1
    through = threading.Event()

    def once() -> None:
        match kind:
            case "all_reduce":
                group.all_reduce(tensor)
            case "async":
                for work in [group.all_reduce(tensor, async_op=True) for _ in range(3)]:
                    work.wait()
            case "broadcast":
                group.broadcast(tensor, last)
            case "send":  # the others wait for the last one, who hears from one of them
                if group.rank == last:
                    group.irecv(tensor, 0).wait()
                elif group.rank == 0:
                    group.isend(tensor, last).wait()
                group.barrier()
            case "receive":
                if group.rank == last:
                    group.isend(tensor, 0).wait()
                elif group.rank == 0:
                    group.irecv(tensor, last).wait()
                group.barrier()
            case _:
                group.barrier()

    def loop() -> None:
        while True:
            once()
            tensor.fill_(1.0)
            through.set()

    peer.start(loop)
    through.wait()


def outcome(peer: Peer) -> tuple[str, str]:
    """How the training thread ended; blocks until it has."""
    assert peer.thread is not None
    peer.thread.join()
    return type(peer.error).__name__, str(peer.error)


def blocked(peer: Peer) -> bool:
    return peer.thread is not None and peer.thread.is_alive()


def abort(peer: Peer) -> tuple[str, float]:
    return peer.abort()


KINDS = ("all_reduce", "async", "broadcast", "send", "receive", "barrier")


@pytest.mark.parametrize("kind", KINDS)
def test_a_kill_frees_all_survivors_by_itself(kind: str) -> None:
    with children(serve, 4) as peers:
        infos = [peer.receive() for peer in peers]
        ask_all(peers, connect, 1, infos)
        ask_all(peers, run_forever, kind, 1_000_000)
        peers[-1].kill()
        for error, text in ask_all(peers[:-1], outcome):
            assert error == "GroupBroken"
            assert "group world: worker w" in text


@pytest.mark.parametrize("kind", KINDS)
def test_a_stopped_peer_blocks_the_others_until_they_abort(kind: str) -> None:
    with children(serve, 4) as peers:
        infos = [peer.receive() for peer in peers]
        for generation in range(1, 6):
            ask_all(peers, connect, generation, infos)
            ask_all(peers, run_forever, kind, 1_000_000)
            peers[-1].stop()
            assert all(ask_all(peers[:-1], blocked))
            for error, _ in ask_all(peers[:-1], abort):
                # Whoever aborts later than its neighbours may see their connections closed first.
                assert error in ("GroupAborted", "GroupBroken")
            peers[-1].resume()
            assert ask_all(peers[-1:], outcome)[0][0] == "GroupBroken"


def start_connect(peer: Peer, generation: int, infos: Sequence[WorkerInfo]) -> None:
    peer.start(peer.make(generation, infos, ()).connect)


def connect_error(peer: Peer, generation: int, infos: Sequence[WorkerInfo], abort_first: bool) -> str:
    groups = peer.make(generation, infos, ())
    if abort_first:
        groups.abort()
    try:
        groups.connect()
    except GroupBroken as error:
        return type(error).__name__
    return ""


def test_an_abort_frees_who_waits_for_a_peer_that_never_comes() -> None:
    with children(serve, 3) as peers:
        infos = [peer.receive() for peer in peers]
        ask_all(peers[:2], start_connect, 1, infos)
        assert ask_all(peers[:2], blocked) == [True, True]
        assert [error for error, _ in ask_all(peers[:2], abort)] == ["GroupAborted"] * 2
        # Who comes late finds that nobody wants that generation any more; the next one works.
        ask_all(peers[2:], connect_error, 1, infos, False)
        ask_all(peers, connect, 2, infos)
        ask_all(peers, check_collectives, 1000, torch.float32)


def test_an_abort_frees_who_connects_to_a_host_that_does_not_answer() -> None:
    """A listener whose queue is full answers no more SYNs, like a host that is gone."""
    with children(serve, 1) as peers, socket.create_server(("127.0.0.1", 0), backlog=0) as dead:
        fillers = [socket.socket() for _ in range(8)]
        for filler in fillers:
            filler.setblocking(False)
            filler.connect_ex(dead.getsockname())
        me = peers[0].receive()
        gone = WorkerInfo(WorkerId("gone"), NodeId("n1"), 1, store_port=dead.getsockname()[1])
        ask_all(peers, start_connect, 1, [gone, me])
        assert ask_all(peers, blocked) == [True]
        assert ask_all(peers, abort)[0][0] == "GroupAborted"
        for filler in fillers:
            filler.close()


def test_an_abort_before_connect_holds() -> None:
    with children(serve, 2) as peers:
        infos = [peer.receive() for peer in peers]
        assert ask_all(peers, connect_error, 1, infos, True) == ["GroupAborted"] * 2
        # Also for a GroupSet that is made only after the generation was aborted, and for older ones.
        assert ask_all(peers, connect_error, 0, infos, False)[0] in ("GroupAborted", "GroupBroken")


def operations_after_abort(peer: Peer) -> list[str]:
    assert peer.groups is not None
    peer.groups.abort()
    group = peer.groups.world
    tensor = torch.ones(1)
    operations: list[Callable[[], Any]] = [
        lambda: group.all_reduce(tensor),
        lambda: group.all_reduce(tensor, async_op=True).wait(),
        lambda: group.broadcast(tensor, 0),
        lambda: group.isend(tensor, 1 - group.rank),
        lambda: group.irecv(tensor, 1 - group.rank).wait(),
        group.barrier,
    ]
    errors = []
    for operation in operations:
        with pytest.raises(GroupAborted) as caught:
            operation()
        errors.append(type(caught.value).__name__)
    return errors


def test_after_an_abort_every_operation_says_so() -> None:
    with children(serve, 2) as peers:
        infos = [peer.receive() for peer in peers]
        ask_all(peers, connect, 1, infos)
        assert ask_all(peers, operations_after_abort) == [["GroupAborted"] * 6] * 2


def reduce_length(peer: Peer, count: int) -> str:
    assert peer.groups is not None
    try:
        peer.groups.world.all_reduce(torch.ones(count))
    except GroupBroken as error:
        return str(error)
    return ""


@pytest.mark.parametrize("lengths", [(10, 11), (500_000, 3), (500_000, 500_001)])
def test_unequal_sizes_are_an_error_and_neither_a_hang_nor_a_crash(lengths: tuple[int, int]) -> None:
    with children(serve, 2) as peers:
        infos = [peer.receive() for peer in peers]
        ask_all(peers, connect, 1, infos)
        for peer, length in zip(peers, lengths, strict=True):
            peer.send((reduce_length, length))
        texts = [peer.receive() for peer in peers]
        assert all(texts)
        assert any("different code or different layouts" in text for text in texts)


# ---------------------------------------------------------------- again and again


def close(peer: Peer) -> None:
    assert peer.groups is not None
    peer.groups.close()
    peer.groups.close()


def usage(_: Peer) -> tuple[int, list[str]]:
    """Open file descriptors, and threads by name (not from /proc, where a joined thread stays for a moment)."""
    for thread in threading.enumerate():
        if thread.name == "evenkeel-outbox":
            thread.join()  # it has nothing left to do and is about to end; if not, the test hangs here
    return len(os.listdir("/proc/self/fd")), sorted(thread.name for thread in threading.enumerate())


def test_the_survivors_and_a_spare_go_on_after_rank_0_died() -> None:
    with children(serve, 4) as peers:
        infos = [peer.receive() for peer in peers]
        ask_all(peers[:3], connect, 1, infos[:3])
        ask_all(peers[:3], run_forever, "all_reduce", 1000)
        peers[0].kill()
        ask_all(peers[1:3], outcome)
        ask_all(peers[1:3], close)
        ask_all(peers[1:], connect, 2, infos[1:])
        ask_all(peers[1:], set_rank)
        ask_all(peers[1:], check_collectives, 1000, torch.float32)


def set_rank(peer: Peer) -> None:
    """The ranks of the new generation are not those of the old one."""
    assert peer.groups is not None
    assert peer.groups.world.rank == peer.rank - 1


def live(peer: Peer, generation: int, infos: Sequence[WorkerInfo], specs: Sequence[GroupSpec]) -> None:
    """A generation with work under way in every way there is, up to its abort."""
    connect(peer, generation, infos, specs)
    assert peer.groups is not None
    world = peer.groups.world
    big, got = torch.ones(2_000_000), torch.empty(2_000_000)
    world.all_reduce(torch.ones(100_000), async_op=True).wait()
    world.isend(big, (world.rank + 1) % world.size)
    if generation % 2:
        world.irecv(got, (world.rank - 1) % world.size).wait()
    world.barrier()
    world.all_reduce(torch.ones(100_000), async_op=True)
    peer.groups.close()


def test_fifty_generations_leave_nothing_behind() -> None:
    with children(serve, 3) as peers:
        infos = [peer.receive() for peer in peers]
        specs = (GroupSpec("pair", (name(0), name(2))), GroupSpec("again", tuple(map(name, range(3))), separate=True))
        ask_all(peers, live, 1, infos, specs)
        before = ask_all(peers, usage)
        for generation in range(2, 52):
            ask_all(peers, live, generation, infos, specs)
        assert ask_all(peers, usage) == before
        assert before[0][1] == ["MainThread", "evenkeel-rendezvous"]


def abort_at(peer: Peer, generation: int, infos: Sequence[WorkerInfo], delay_s: float) -> str:
    """Connects and communicates; a timer aborts at some moment of it. How the thread ended."""
    groups = peer.make(generation, infos, [GroupSpec("again", tuple(i.worker_id for i in infos), separate=True)])

    def work() -> None:
        groups.connect()
        tensor, got = torch.ones(70_000), torch.empty(70_000)
        while True:
            pending = groups["again"].all_reduce(tensor, async_op=True)
            groups.world.isend(tensor, (groups.world.rank + 1) % groups.world.size)
            groups.world.irecv(got, (groups.world.rank - 1) % groups.world.size).wait()
            groups.world.all_reduce(got)
            pending.wait()
            tensor.fill_(1.0)

    peer.start(work)
    timer = threading.Timer(delay_s, groups.abort)
    timer.start()
    name_of_error = outcome(peer)[0]
    timer.join()
    groups.close()
    return name_of_error


def test_an_abort_at_any_moment_ends_everything() -> None:
    with children(serve, 3) as peers:
        infos = [peer.receive() for peer in peers]
        before = None
        for generation in range(1, 61):
            for rank, peer in enumerate(peers):
                # From 0 to 12 ms, in the whole of connecting and well into the work, at each another time.
                peer.send((abort_at, generation, infos, ((generation * 7 + rank * 13) % 60) * 0.0002))
            for peer in peers:
                assert peer.receive() in ("GroupAborted", "GroupBroken")
            before = before or ask_all(peers, usage)
        assert ask_all(peers, usage) == before


# ---------------------------------------------------------------- strangers


def test_strangers_and_half_a_hello_disturb_nobody() -> None:
    with children(serve, 2) as peers:
        infos = [peer.receive() for peer in peers]
        address = ("127.0.0.1", infos[0].store_port)
        with socket.create_connection(address) as stranger, socket.create_connection(address) as slow:
            stranger.sendall(b"GET / HTTP/1.1\r\n\r\n")
            slow.sendall(b"evk1\0")
            ask_all(peers, connect, 1, infos)
            ask_all(peers, check_collectives, 1000, torch.float32)
            assert stranger.recv(1) == b""


def use_store(peer: Peer) -> list[str]:
    """Through torch's C++ prefix store, as ProcessGroupNCCL does."""
    assert peer.groups is not None
    assert isinstance(peer.groups.world, tcp.TcpGroup)
    store = GroupStore(peer.groups.world)
    prefixed = dist.PrefixStore("g1", store)
    if peer.groups.world.rank == 0:
        prefixed.set("first", "a" * 128)
        prefixed.set("second", "b")
    return [prefixed.get(key).decode() for key in ("first", "second")]


def test_a_group_is_store_enough_for_nccl() -> None:
    with children(serve, 3) as peers:
        infos = [peer.receive() for peer in peers]
        ask_all(peers, connect, 1, infos)
        assert ask_all(peers, use_store) == [["a" * 128, "b"]] * 3


def test_nccl_only_where_every_worker_has_a_gpu_of_its_own() -> None:
    def info(name: str, node: str, device: str = "cuda", visible: str = "0") -> WorkerInfo:
        return WorkerInfo(WorkerId(name), NodeId(node), 1, device=device, visible_devices=visible)

    assert communicator_for([info("a", "n1"), info("b", "n1", visible="1"), info("c", "n2")]) is NcclGroup
    assert communicator_for([info("a", "n1"), info("b", "n1"), info("c", "n2")]) is tcp.TcpGroup
    assert communicator_for([info("a", "n1", visible=""), info("b", "n1", visible="")]) is tcp.TcpGroup
    assert communicator_for([info("a", "n1", "cpu", ""), info("b", "n2", "cpu", "")]) is tcp.TcpGroup
