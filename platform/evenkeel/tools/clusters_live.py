"""The devices of a Ray cluster that runs."""

from collections.abc import Iterable, Mapping, Sequence

from evenkeel.config_values import ConfigError
from evenkeel.plan.hardware import Cluster, NodeKind
from evenkeel.runtime.cluster import NoClusterError, nodes_of
from evenkeel.tools.clusters import KEY, merged
from evenkeel.tools.devices import Catalogue

TYPE = "accelerator_type:"
CPU = "cpu"
"""The name of a CPU slot as a device, as workers on CPUs say it. Nobody publishes a table of it: it is the user's."""


def live_cluster(address: str | None, use_gpu: bool, catalogue: Catalogue) -> Cluster:
    """The GPUs of a running cluster by what Ray says of their nodes, or its CPUs.

    Args:
        address: None: RAY_ADDRESS, or what `ray start` left on this machine.

    Raises:
        ConfigError: if it cannot be joined, has no such device, or one that no table knows.
    """
    try:
        return cluster_of(nodes_of(address), use_gpu, catalogue)
    except NoClusterError as error:
        raise ConfigError(str(error), KEY) from None


def cluster_of(nodes: Sequence[Mapping[str, float]], use_gpu: bool, catalogue: Catalogue) -> Cluster:
    """The devices of nodes with these resources, by Ray's names.

    Raises:
        ConfigError: if there are none, or one that no table knows.
    """
    found = merged(_kinds(nodes, use_gpu, catalogue))
    if not found.nodes:
        what = "GPU; with scaling.use_gpu=false its CPUs are planned for" if use_gpu else "CPU"
        raise ConfigError(f"none of the {len(nodes)} nodes of the running cluster has a {what}", KEY)
    return found


def _kinds(nodes: Iterable[Mapping[str, float]], use_gpu: bool, catalogue: Catalogue) -> Iterable[tuple[NodeKind, int]]:
    for node in nodes:
        devices = int(node.get("GPU" if use_gpu else "CPU", 0))
        if devices:
            name = next((r.removeprefix(TYPE) for r in node if r.startswith(TYPE)), "") if use_gpu else CPU
            if not name:
                raise ConfigError(f"Ray does not say what kind of GPU a node with {devices} of them has", KEY)
            yield catalogue.find(name, KEY, "").node(devices), 1
