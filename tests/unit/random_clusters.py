"""Random clusters and models for tests of the planner."""

import random
from dataclasses import replace

from evenkeel.plan.hardware import Cluster, DeviceKind, Link, NodeKind
from evenkeel.plan.workload import LayerWork, Workload

GIB = 2**30


def small_cluster(rng: random.Random, most: int) -> Cluster:
    """At most so many devices of up to three kinds, some with little memory, some with slow links."""
    nodes: list[tuple[NodeKind, int]] = []
    left = rng.randint(2, most)
    while left and len(nodes) < 3:
        devices = rng.choice([d for d in (1, 2, 4) if d <= left])
        count = rng.randint(1, left // devices)
        left -= devices * count
        memory = rng.choice([30_000, 60_000, 100_000, 10**9])
        flops = rng.choice([1, 1.5, 2, 3.266, 5]) * 1e12
        device = DeviceKind(f"kind{len(nodes)}", memory, {"bf16": flops}, rng.choice([1e9, 1e7]), 1.0)
        inside, between = Link(rng.choice([1e6, 1e8]), 1e-4), Link(rng.choice([1e5, 1e6, 1e8]), 1e-3)
        nodes.append((NodeKind(device, devices, inside, between), count))
    return Cluster(tuple(nodes))


def small_work(rng: random.Random, most: int) -> Workload:
    """At most so many layers, no two alike."""
    layers = []
    for i in range(rng.randint(1, most)):
        flops, params, kept = rng.uniform(0.2, 1) * 1e12, rng.randint(100, 2000), rng.randint(100, 3000)
        cut = rng.randint(0, params), rng.randint(0, kept)
        sent = rng.randint(1, 2000), rng.randint(0, 2000)
        layers.append(LayerWork(f"layer{i}", flops, 2 * flops, params, cut[0], kept, cut[1], *sent))
    return Workload(tuple(layers), "bf16", 10, rng.choice([1, 2, 4]), rng.random() < 0.3)


def node_kinds(rng: random.Random, kinds: int, sizes: tuple[int, ...]) -> list[NodeKind]:
    """Real proportions: memory of 12 to 80 GiB, 40 to 300 TFLOP/s reached, links within faster than between."""
    found = []
    for i in range(kinds):
        flops, memory = rng.choice([1, 1.5, 2, 3.266, 5]) * 1e14, rng.choice([12, 24, 40, 80]) * GIB
        between = rng.choice([1e9, 1e10, 5e10])
        device = DeviceKind(f"kind{i}", memory, {"bf16": flops}, 1e12, rng.uniform(0.3, 0.6))
        inside = Link(max(between, rng.choice([1e10, 2e11])), 5e-6)
        found.append(NodeKind(device, rng.choice(sizes), inside, Link(between, 1e-5)))
    return found


def decoder(layers: int, width: int, sequence: int, recompute: bool = False) -> Workload:
    """A decoder's counts: 12 width^2 parameters a block, 32,000 tokens to choose from."""
    params, tokens = 12 * width * width, 32_000
    sent, flops = sequence * width * 2, 2 * params * sequence
    block = LayerWork("block", flops, 2 * flops, params, params, 15 * sent, 12 * sent, sent, 2 * sent)
    embedding = LayerWork("embedding", 0, 0, tokens * width, tokens * width, 8 * sequence, 0, sent, sent)
    flops, logits = 2 * sequence * width * tokens, 4 * sequence * tokens
    head = LayerWork("head", flops, 2 * flops, tokens * width, tokens * width, logits, logits, 0, 0)
    return Workload((embedding, *[block] * layers, head), "bf16", sequence, 8, recompute)


def one_device_less(cluster: Cluster, i: int) -> Cluster:
    """One of the i-th kind of node has lost a device."""
    nodes = list(cluster.nodes)
    kind, count = nodes[i]
    nodes[i] = (kind, count - 1)
    if kind.devices > 1:
        nodes.append((replace(kind, devices=kind.devices - 1), 1))
    return Cluster(tuple(nodes))
