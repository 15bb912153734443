"""Clusters as the user says them: in short, such as "8xH100+2x4xA100", or in a YAML file."""

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from os.path import isfile
from typing import Any

from evenkeel.config import read_text
from evenkeel.config_values import ConfigError, convert, shortened
from evenkeel.plan.hardware import Cluster, NodeKind
from evenkeel.tools.devices import Catalogue, DeviceTable, LinkTable, check_link, mapping_of

SHORT = re.compile(r"(?:(\d+)x)?(\d+)x([^\s+]+(?: [^\s+]+)*)")
HOW = 'expected "8xH100" (devices, in nodes of the usual size) or "2x8xH100" (nodes of so many devices), joined by "+"'
MOST = 10_000_000
MOST_DIGITS = 20
"""Of a number that is read: with more it is too large anyway, and Python refuses some thousands."""
KEY = "cluster"


@dataclass(frozen=True, slots=True)
class NodesEntry:
    """`count` nodes of `devices` devices of a kind each; null for devices: as many as such a node usually has."""

    kind: str
    count: int = 1
    devices: int | None = None
    inside: LinkTable | None = None
    between: LinkTable | None = None


@dataclass(frozen=True, slots=True)
class ClusterFile:
    """What a cluster's file says."""

    nodes: list[NodesEntry]
    devices: dict[str, Any] = field(default_factory=dict)


def read_cluster(text: str, catalogue: Catalogue) -> Cluster:
    """A cluster in short, or from the file of that name.

    Raises:
        ConfigError: naming file and key.
    """
    if text.endswith((".yaml", ".yml")) or isfile(text):
        return _from_file(text, catalogue)
    return _from_short(text, catalogue)


def _from_short(text: str, catalogue: Catalogue) -> Cluster:
    nodes: list[tuple[NodeKind, int]] = []
    for part in text.split("+"):
        said = shortened(part.strip(), 80)
        match = SHORT.fullmatch(part.strip().replace("×", "x"))
        if match is None:
            raise ConfigError(f"{said!r} is not understood; {HOW}", KEY)
        count, devices = (int(number[:MOST_DIGITS]) for number in (match[1] or "1", match[2]))
        if not 0 < count * devices <= MOST:
            raise ConfigError(f"{said!r}: expected 1 to {MOST:,} devices", KEY)
        table = catalogue.find(match[3], KEY, "")
        nodes += [(table.node(devices), count)] if match[1] else _usual_nodes(table, devices)
    return merged(nodes)


def _usual_nodes(table: DeviceTable, devices: int) -> Iterable[tuple[NodeKind, int]]:
    """As many devices in nodes of the usual size, and what is left over in a smaller one."""
    full, rest = divmod(devices, table.devices_per_node)
    if full:
        yield table.node(table.devices_per_node), full
    if rest:
        yield table.node(rest), 1


def _from_file(path: str, catalogue: Catalogue) -> Cluster:
    file: ClusterFile = convert(mapping_of(read_text(path), path), ClusterFile, "", path, False)
    if not file.nodes:
        raise ConfigError("has no nodes", "nodes", path)
    known = catalogue.with_own(file.devices, path) if file.devices else catalogue
    nodes = []
    for i, entry in enumerate(file.nodes):
        key = f"nodes.{i}"
        table = known.find(entry.kind, f"{key}.kind", path)
        devices = table.devices_per_node if entry.devices is None else entry.devices
        for name, value in (("count", entry.count), ("devices", devices)):
            if not 0 < value <= MOST:
                raise ConfigError(f"is {value}; expected 1 to {MOST:,}", f"{key}.{name}", path)
        if entry.count * devices > MOST:
            raise ConfigError(f"has {entry.count * devices:,} devices; expected 1 to {MOST:,}", key, path)
        inside, between = entry.inside or table.inside, entry.between or table.between
        check_link(inside, f"{key}.inside", path)
        check_link(between, f"{key}.between", path)
        nodes.append((NodeKind(table.kind(), devices, inside.link(), between.link()), entry.count))
    return merged(nodes)


def merged(nodes: Iterable[tuple[NodeKind, int]]) -> Cluster:
    """Equal kinds of nodes together. A device's peaks are a mapping, so that kinds have no hash."""
    kinds: list[NodeKind] = []
    counts: list[int] = []
    for kind, count in nodes:
        if kind not in kinds:
            kinds.append(kind)
            counts.append(0)
        counts[kinds.index(kind)] += count
    return Cluster(tuple(zip(kinds, counts, strict=True)))


def cluster_text(cluster: Cluster) -> str:
    """In short: "1x8xNVIDIA H100 80GB HBM3 + 2x8xNVIDIA A100-SXM4-80GB"."""
    return " + ".join(f"{count}x{kind.devices}x{kind.device.name}" for kind, count in cluster.nodes)
