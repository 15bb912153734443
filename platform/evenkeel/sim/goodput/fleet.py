"""The nodes that are there, and the workers on them: started in the background, gone with their node."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from evenkeel.control import messages as m
from evenkeel.core.ids import NodeId, WorkerId
from evenkeel.core.layout import WorkerInfo
from evenkeel.sim.clock import Clock
from evenkeel.sim.goodput.costs import Costs

Hear = Callable[[Sequence[m.Event]], None]


@dataclass
class Node:
    """One stay of a node. `workers` are those that start or are ready there."""

    name: str
    workers: set[WorkerId] = field(default_factory=set)


class Fleet:
    """Who is there.

    Args:
        slots: how many workers a node has room for.
        costs: of a start, and of the word of a death.
        hear: takes what happens at once.
        kinds: of device, by node, where they differ.

    Attributes:
        nodes: that are there, by name.
        alive: workers that are ready, with where they are.
        pending: workers that were asked for, and for which no node has room.
        node_seconds: of all nodes, up to the last change.
    """

    def __init__(self, clock: Clock, slots: int, costs: Costs, hear: Hear, kinds: Mapping[str, str]) -> None:
        self._clock = clock
        self._slots = slots
        self._costs = costs
        self._hear = hear
        self._kinds = kinds
        self.nodes: dict[str, Node] = {}
        self.alive: dict[WorkerId, Node] = {}
        self.pending = 0
        self.node_seconds = 0.0
        self._counted_to = 0.0
        self._room: dict[str, Node] = {}
        """Nodes with room for more workers, those first that lack only some."""
        self._used = 0

    def count(self, now: float) -> None:
        """Brings `node_seconds` up to date."""
        self.node_seconds += len(self.nodes) * (now - self._counted_to)
        self._counted_to = now

    def come(self, name: str) -> None:
        """Raises ValueError if that node is there."""
        if name in self.nodes:
            raise ValueError(f"node {name} comes at {self._clock.now:.0f} s, but it is there")
        self.count(self._clock.now)
        self.nodes[name] = self._room[name] = Node(name)
        self._place()

    def go(self, name: str) -> tuple[WorkerId, ...]:
        """All that is on this node dies. Returns those of its workers that were ready.

        Raises:
            ValueError: if that node is not there.
        """
        if name not in self.nodes:
            raise ValueError(f"node {name} goes at {self._clock.now:.0f} s, but it is not there")
        self.count(self._clock.now)
        node = self.nodes.pop(name)
        self._room.pop(name, None)
        dead = sorted(node.workers)
        ready = tuple(worker for worker in dead if self.alive.pop(worker, None) is not None)
        node.workers.clear()
        self._tell_of_deaths(dead, f"node {name} is gone", with_node=True)
        return ready

    def kill(self, worker: WorkerId, cause: str) -> tuple[WorkerId, ...]:
        """This worker's process ends, and its node has room for another. Returns it, unless it was not there."""
        node = self.alive.pop(worker, None)
        if node is None:
            return ()
        node.workers.discard(worker)
        self._room = {node.name: node, **self._room}
        self._tell_of_deaths([worker], cause)
        self._place()
        return (worker,)

    def start(self, count: int) -> None:
        """As many workers start, as soon as there is room."""
        self.pending += count
        self._place()

    def _place(self) -> None:
        while self.pending and self._room:
            node = next(iter(self._room.values()))
            count = min(self.pending, self._slots - len(node.workers))
            self.pending -= count
            if count + len(node.workers) == self._slots:
                del self._room[node.name]
            infos = [self._new(node) for _ in range(count)]
            self._clock.after(self._costs.start_s, self._ready(node, infos))

    def _new(self, node: Node) -> WorkerInfo:
        self._used += 1
        info = WorkerInfo(
            WorkerId(f"w{self._used:06d}"), NodeId(node.name), self._used, kind=self._kinds.get(node.name, "cpu")
        )
        node.workers.add(info.worker_id)
        return info

    def _ready(self, node: Node, infos: Sequence[WorkerInfo]) -> Callable[[], None]:
        def ready() -> None:
            here = [info for info in infos if info.worker_id in node.workers]
            self.alive.update((info.worker_id, node) for info in here)
            self._hear([m.WorkerReady(info) for info in here])

        return ready

    def _tell_of_deaths(self, workers: Sequence[WorkerId], cause: str, with_node: bool = False) -> None:
        deaths = [m.WorkerLost(worker, cause, with_node) for worker in workers]
        if deaths:
            self._clock.after(self._costs.detect_s, lambda: self._hear(deaths))
