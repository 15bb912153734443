"""When nodes go and come back: drawn from a seed, or as a trace tells."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from heapq import merge
from math import inf, isfinite
from pathlib import Path
from random import Random

from evenkeel.sim.goodput.setting import Change

DAY_S = 86400.0
MOST_DIGITS = 15
"""Of a trace's milliseconds."""


class TraceError(ValueError):
    """A trace that is not what a trace is: names its file and line."""


@dataclass(frozen=True, slots=True)
class Repair:
    """How long a node is away.

    Attributes:
        mean_s: inf: nodes do not come back.
        fixed: always just so long; else exponentially distributed.

    Raises:
        ValueError: if the time is not above 0.
    """

    mean_s: float = DAY_S
    fixed: bool = False

    def __post_init__(self) -> None:
        if not self.mean_s > 0:
            raise ValueError(f"a repair takes {self.mean_s} s; it must be above 0")

    def draw(self, random: Random) -> float:
        """Seconds of one repair."""
        return self.mean_s if self.fixed or self.mean_s == inf else random.expovariate(1 / self.mean_s)


@dataclass(frozen=True, slots=True)
class Drawn:
    """Failures at any time (Poisson), of single nodes and of whole racks.

    Each node, and each rack, fails and is repaired by itself, by random numbers of its own: so the failures of a node
    are the same in a larger cluster, and settings are compared under the same ones. A node is there while neither it
    nor its rack is down.

    Attributes:
        per_node_day: failures that a node meets in a day of being there, by its rack's too.
        rack: neighbouring nodes that fail together; the last rack may have fewer.
        rack_share: the part of the failures, 0 to 1, that a node meets together with its rack.

    Raises:
        ValueError: if one of them makes no sense.
    """

    per_node_day: float
    repair: Repair = Repair()
    rack: int = 1
    rack_share: float = 0.0

    def __post_init__(self) -> None:
        if not (self.per_node_day >= 0 and isfinite(self.per_node_day)):
            raise ValueError(f"{self.per_node_day} failures per node-day; it must be 0 or more, and finite")
        if self.rack < 1:
            raise ValueError(f"a rack of {self.rack} nodes; it must be at least 1")
        if not 0 <= self.rack_share <= 1:
            raise ValueError(f"a share of {self.rack_share} of the failures takes whole racks; it must be 0 to 1")

    def changes(self, nodes: Sequence[str], seed: int, until_s: float) -> Iterator[Change]:
        """In order of time, up to `until_s`."""
        rate = self.per_node_day / DAY_S
        racks = [nodes[i : i + self.rack] for i in range(0, len(nodes), self.rack)]
        units: list[tuple[str, tuple[str, ...], float]]
        units = [(f"{seed}/node/{node}", (node,), rate * (1 - self.rack_share)) for node in nodes]
        units += [(f"{seed}/rack/{members[0]}", tuple(members), rate * self.rack_share) for members in racks]
        outages = (self._outages(Random(name), members, rate, until_s) for name, members, rate in units if rate)
        down: Counter[str] = Counter()
        for at_s, there, members in merge(*outages):
            for node in members:
                down[node] += -1 if there else 1
                if down[node] == (0 if there else 1):
                    yield Change(at_s, node, there)

    def expected_changes(self, nodes: int, until_s: float) -> float:
        """About how many there are: each node fails, is away for its repair, and so on."""
        if not self.per_node_day:
            return 0.0
        cycle_s = DAY_S / self.per_node_day + self.repair.mean_s
        return 2 * nodes * until_s / cycle_s if isfinite(cycle_s) else float(nodes)

    def _outages(
        self, random: Random, members: tuple[str, ...], rate: float, until_s: float
    ) -> Iterator[tuple[float, bool, tuple[str, ...]]]:
        """(second, whether they come back, who) of what fails together."""
        at_s, there = 0.0, True
        while True:
            at_s += random.expovariate(rate) if there else self.repair.draw(random)
            if at_s > until_s:
                return
            there = not there
            yield at_s, there, members


@dataclass(frozen=True, slots=True)
class Trace:
    """What was seen of a cluster once.

    Attributes:
        beginning: the nodes that are there at second 0.
        later: what happens after it, in order of time.
    """

    name: str
    beginning: tuple[str, ...]
    later: tuple[Change, ...]

    @property
    def duration_s(self) -> float:
        """To its last change."""
        return self.later[-1].at_s if self.later else 0.0

    @property
    def most(self) -> int:
        """Nodes at the same time."""
        count = most = len(self.beginning)
        for change in self.later:
            count += 1 if change.there else -1
            most = max(most, count)
        return most

    def changes(self, nodes: Sequence[str], seed: int, until_s: float) -> Iterator[Change]:
        """In order of time, up to `until_s`; the same for every seed.

        Raises:
            ValueError: if other nodes are there than at the trace's beginning.
        """
        if set(nodes) != set(self.beginning):
            raise ValueError(
                f"{self.name}: the trace begins with {len(self.beginning)} nodes of its own, not {len(nodes)}"
            )
        return (change for change in self.later if change.at_s <= until_s)


def read_trace(path: Path) -> Trace:
    """Reads lines of milliseconds,add|remove,node. What is added at 0 ms is there at the beginning.

    Raises:
        TraceError: if the file cannot be read, or a line is not such, goes back in time, adds a node that is there or
            removes one that is not.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise TraceError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from None
    there: set[str] = set()
    beginning: list[str] = []
    later: list[Change] = []
    before = 0
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        at_ms, adds, node = _parts(line, where)
        if at_ms < before:
            raise TraceError(
                f"{where}: goes back in time, from {before} ms to {at_ms} ms; lines must be in order of time"
            )
        if adds == (node in there):
            what = f"adds {node}, which is there already" if adds else f"removes {node}, which is not there"
            raise TraceError(f"{where}: {what}")
        before = at_ms
        (there.add if adds else there.remove)(node)
        if at_ms == 0 and adds:
            beginning.append(node)
        else:
            later.append(Change(at_ms / 1000, node, adds))
    if not beginning and not later:
        raise TraceError(f"{path}: is empty; expected lines of milliseconds,add|remove,node")
    return Trace(str(path), tuple(beginning), tuple(later))


def _parts(line: str, where: str) -> tuple[int, bool, str]:
    """(milliseconds, whether it adds, node) of one line."""
    parts = [part.strip() for part in line.split(",")]
    expected = "expected milliseconds,add|remove,node, such as 480000,add,node1"
    if len(parts) != 3 or not parts[2]:
        raise TraceError(f"{where}: {line.strip()!r} is not a change; {expected}")
    if not (parts[0].isascii() and parts[0].isdecimal()):
        raise TraceError(f"{where}: {parts[0]!r} is not a number of milliseconds; {expected}")
    if len(parts[0]) > MOST_DIGITS:
        raise TraceError(f"{where}: {parts[0][:MOST_DIGITS]}... ms is longer than 30,000 years; {expected}")
    if parts[1] not in ("add", "remove"):
        raise TraceError(f"{where}: {parts[1]!r} is neither add nor remove; {expected}")
    return int(parts[0]), parts[1] == "add", parts[2]
