"""The planner for unequal devices: TP degree, pipelines of any depth and mix of devices, cuts, shares, copies.

For every scope (which kinds of node over which link, at which TP degree) and for every number of parts into which the
optimizer state is cut, `formations` says which pipelines fit and how fast they are, and `selection` how many of each
make the shortest step. What cannot be faster than what is known already is not looked at.
"""

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import combinations
from math import inf

from evenkeel.plan.cost import link_between, send_s, stage_memory
from evenkeel.plan.formations import even, formations
from evenkeel.plan.hardware import Cluster, Link, NodeKind
from evenkeel.plan.layout import Infeasible
from evenkeel.plan.plans import Idle, PipelinePlan, Plan, StagePlan, explain
from evenkeel.plan.scopes import Costs, Formation, Scope
from evenkeel.plan.selection import EXACT, NEAR, Group, Search, Selection, bound_s, select, step_s
from evenkeel.plan.shortage import shortage
from evenkeel.plan.workload import Profile, Workload

EXACT_DEVICES = 255
"""Up to so many the best is found of the pipelines that are looked at; of more, one that is hardly slower."""


MOST_KINDS = 4
"""Of more kinds of node not all mixes are looked at by themselves."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What a plan must keep to.

    Attributes:
        tensor: the TP degree; None: any.
        stages: the deepest pipeline.
        copies: where the optimizer state is cut into parts, so many pipelines keep each of them, at least.
        memory: the part of a device's memory that may be planned with; the rest is for the allocator's waste, what is
            communicated, and libraries.

    Raises:
        ValueError: if a number is below 1, or `memory` is not a part.
    """

    tensor: int | None = None
    stages: int = 64
    copies: int = 1
    memory: float = 0.9

    def __post_init__(self) -> None:
        for name in ("tensor", "stages", "copies"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}; it must be at least 1")
        if not 0 < self.memory <= 1:
            raise ValueError(f"memory is {self.memory}; it must be above 0 and at most 1")


@dataclass(frozen=True, slots=True)
class _Best:
    """What is known to be the best so far; `parts`: the optimizer state is cut into so many."""

    costs: Costs
    selection: Selection
    parts: int


def choose(
    cluster: Cluster,
    work: Workload,
    micro_batches: int,
    *,
    limits: Limits | None = None,
    profile: Profile | None = None,
) -> Plan | Infeasible:
    """The plan with the shortest step.

    Raises:
        ValueError: if there is no micro-batch, no layer or no device, a speed or a memory is not positive, or a device
            has no peak for the precision.
    """
    limits = limits or Limits()
    check(cluster, work, micro_batches)
    every = [Costs(scope, work, profile) for scope in scopes(cluster, work, micro_batches, limits, profile)]
    if not every:
        return Infeasible(_no_degree(cluster, work, limits))
    best = _best_uniform(every, micro_batches, limits)
    beat_s = best.selection.step_s if best else inf
    hopes = [_hope(costs, micro_batches, limits) for costs in every if costs.fluid_s(micro_batches) < beat_s]
    hopes.sort(key=lambda hope: hope.least_s)
    is_small = cluster.devices <= EXACT_DEVICES
    best, low_s = _search(hopes, micro_batches, limits, best, _Care(EXACT if is_small else NEAR, is_small))
    if best is None and not is_small:
        best, low_s = _search(hopes, micro_batches, limits, best, _Care(NEAR, True))
    if best is None:
        return shortage(every, micro_batches, limits.stages, limits.copies, limits.memory)
    is_best = low_s >= best.selection.step_s * (1 - 2 * EXACT)
    return _plan(best, cluster, work, best.selection.step_s if is_best else low_s)


def uniform(
    cluster: Cluster,
    work: Workload,
    micro_batches: int,
    *,
    limits: Limits | None = None,
    profile: Profile | None = None,
) -> Plan | Infeasible:
    """For comparison: equal pipelines of one depth, equally many layers in each stage, equal shares; the best of them.

    Raises:
        ValueError: as `choose`.
    """
    limits = limits or Limits()
    check(cluster, work, micro_batches)
    every = [Costs(scope, work, profile) for scope in scopes(cluster, work, micro_batches, limits, profile)]
    best = _best_uniform(every, micro_batches, limits)
    if best is None:
        return Infeasible("no number of equal pipelines of equally many layers per stage fits into the memory")
    return _plan(best, cluster, work, best.selection.step_s)


def check(cluster: Cluster, work: Workload, micro_batches: int) -> None:
    """Raises ValueError for what cannot be planned for."""
    if micro_batches < 1:
        raise ValueError(f"{micro_batches} micro-batches are to be shared out; at least 1 is needed")
    if not work.layers:
        raise ValueError("the model has no layers")
    if cluster.devices < 1:
        raise ValueError("the cluster has no devices")
    for node, count in cluster.nodes:
        device = node.device
        if count < 0 or node.devices < 1:
            raise ValueError(f"{count} nodes of {node.devices} {device.name}: numbers of devices must be positive")
        numbers = {"memory": device.memory, "bytes_per_s": device.bytes_per_s, "reached": device.reached}
        numbers |= {f"flops of {precision}": flops for precision, flops in device.flops.items()}
        numbers |= {"inside": node.inside.bytes_per_s, "between": node.between.bytes_per_s}
        for name, value in numbers.items():
            if not 0 < value < float("inf"):
                raise ValueError(f"{name} of {device.name} is {value}; it must be positive")


def scopes(
    cluster: Cluster, work: Workload, micro_batches: int, limits: Limits, profile: Profile | None
) -> Iterator[Scope]:
    """All kinds of node, and those whose links are at least so fast; and one node of a kind alone, by its own link."""
    nodes: dict[NodeKind, int] = {}
    for kind, count in cluster.nodes:
        if count:
            nodes[kind] = nodes.get(kind, 0) + count
    sent = max(layer.output_bytes for layer in work.layers)
    ordered = sorted(nodes, key=lambda kind: send_s(sent, link_between(kind, kind, "between", profile)))
    used: list[tuple[dict[NodeKind, int], Link]] = []
    for i in range(1, len(ordered) + 1):
        some = ordered[:i]
        link = _slowest([link_between(a, b, "between", profile) for a in some for b in some])
        if used and used[-1][1] == link:
            used.pop()
        used.append(({kind: nodes[kind] for kind in some}, link))
    if len(used[0][0]) == 1 and sum(used[0][0].values()) == 1:
        used.pop(0)
    used += [({kind: 1}, link_between(kind, kind, "inside", profile)) for kind in ordered]
    used += _mixes(ordered, nodes, profile)
    for some_nodes, link in used:
        for tensor in _degrees(some_nodes, work, limits):
            units = tuple(kind.devices // tensor * count for kind, count in some_nodes.items())
            memory = tuple(int(limits.memory * kind.device.memory) for kind in some_nodes)
            inside = tuple(link_between(kind, kind, "inside", profile) for kind in some_nodes)
            yield Scope(tuple(some_nodes), units, tensor, inside, link, memory, micro_batches)


def _mixes(
    ordered: Sequence[NodeKind], nodes: dict[NodeKind, int], profile: Profile | None
) -> Iterator[tuple[dict[NodeKind, int], Link]]:
    """Of 3 or 4 kinds some at a time: of fewer kinds deeper mixed pipelines are looked at."""
    for number in range(2, len(ordered)) if len(ordered) <= MOST_KINDS else ():
        for some in combinations(ordered, number):
            link = _slowest([link_between(a, b, "between", profile) for a in some for b in some])
            yield {kind: nodes[kind] for kind in some}, link


def _slowest(links: Sequence[Link]) -> Link:
    return Link(min(link.bytes_per_s for link in links), max(link.latency_s for link in links))


def _degrees(nodes: dict[NodeKind, int], work: Workload, limits: Limits) -> Iterator[int]:
    """Powers of two that divide what they must, within the largest node; or the one that is asked for."""
    most = max(kind.devices for kind in nodes)
    asked = [limits.tensor] if limits.tensor else [2**i for i in range(most.bit_length())]
    yield from (tensor for tensor in asked if tensor <= most and work.tensor_divides % tensor == 0)


def _no_degree(cluster: Cluster, work: Workload, limits: Limits) -> str:
    most = max(kind.devices for kind, count in cluster.nodes if count)
    return (
        f"TP degree {limits.tensor} is not possible: it must divide {work.tensor_divides} (heads, widths) and be "
        f"at most {most}, the devices of the largest node"
    )


@dataclass(frozen=True, slots=True)
class _Hope:
    """What a scope could be good for if the optimizer state took no memory."""

    costs: Costs
    free: tuple[Formation, ...]
    least_s: float


def _hope(costs: Costs, micro_batches: int, limits: Limits) -> _Hope:
    free = formations(costs, 0.0, limits.stages)
    return _Hope(costs, free, bound_s(free, Search(costs.scope.units, micro_batches, 1, inf, NEAR), (1,)))


@dataclass(frozen=True, slots=True)
class _Care:
    """How thoroughly is searched.

    Attributes:
        worth: see Search.
        is_fine: all numbers of parts of the optimizer state are looked at, of many those that are an eighth apart; else
            it is doubled each time.
    """

    worth: float
    is_fine: bool


def _search(
    hopes: Sequence[_Hope], micro_batches: int, limits: Limits, best: _Best | None, care: _Care
) -> tuple[_Best | None, float]:
    """The best of all scopes, or what is known to be as good, and what no plan beats."""
    low_s = inf
    for hope in hopes:
        if best is None or hope.least_s < best.selection.step_s:
            found, here_s = _within(hope, micro_batches, limits, best, care)
            best, low_s = found or best, min(low_s, here_s)
    return best, low_s


def _within(
    hope: _Hope, micro_batches: int, limits: Limits, best: _Best | None, care: _Care
) -> tuple[_Best | None, float]:
    """The best of a scope, if it beats the best so far, and what no plan of the scope beats.

    The optimizer state is whole at first, and cut into more and more parts as long as not to keep it at all would make
    the step shorter by what is worth it.
    """
    costs, units = hope.costs, hope.costs.scope.units
    found: _Best | None = None
    now_s, low_s = best.selection.step_s if best else inf, inf
    parts = 1
    kinds: tuple[Formation, ...] = ()
    fewest = min((len(f.kinds) for f in hope.free), default=1)
    while parts == 1 or limits.copies * parts <= min(micro_batches, sum(units) // fewest):
        at_least = 1 if parts == 1 else limits.copies * parts
        search = Search(units, micro_batches, at_least, now_s, care.worth)
        least_s = bound_s(hope.free, search)
        if least_s >= now_s * (1 - care.worth):
            low_s = min(low_s, least_s)
            break
        kinds, before = formations(costs, 1 / parts, limits.stages), kinds
        if kinds != before:  # of the same with more that must keep parts none is better
            selection, here_s = select(kinds, search)
            low_s = min(low_s, here_s)
            if selection is not None and (parts == 1 or selection.step_s < now_s * (1 - care.worth / 8)):
                found, now_s = _Best(costs, selection, parts), selection.step_s
        if kinds == hope.free:
            break
        parts += max(1, parts // 8) if care.is_fine else parts
    return found, low_s


Order = tuple[tuple[int, ...], int]
"""The kinds of a pipeline's stages, and how many pipelines have them."""


def _best_uniform(every: Sequence[Costs], micro_batches: int, limits: Limits) -> _Best | None:
    found = (best for costs in every for best in _uniforms(costs, micro_batches, limits))
    return min(found, key=lambda best: best.selection.step_s, default=None)


def _uniforms(costs: Costs, micro_batches: int, limits: Limits) -> Iterator[_Best]:
    """With the fewest parts of the optimizer state that fit, one for each depth."""
    units = sum(costs.scope.units)
    for depth in range(1, min(limits.stages, costs.layers, units) + 1):
        data = min(units // depth, micro_batches)
        uniform = partial(_uniform, costs, list(_in_a_row(costs.scope.units, depth, data)), micro_batches, data)
        every = range(1, max(2, data // limits.copies + 1))
        if uniform(every[-1]) is not None:
            parts = every[bisect_left(every, True, hi=len(every) - 1, key=lambda parts: uniform(parts) is not None)]
            groups = uniform(parts)
            assert groups is not None
            yield _Best(costs, Selection(groups, step_s(groups)), parts)


def _uniform(
    costs: Costs, orders: Sequence[Order], micro_batches: int, data: int, parts: int
) -> tuple[Group, ...] | None:
    formed = [(even(costs, order, 1 / parts), count) for order, count in orders]
    groups = _equal_shares(formed, micro_batches, data)
    return groups if all(share <= formation.most for formation, _, share in groups) else None


def _in_a_row(units: Sequence[int], depth: int, data: int) -> Iterator[Order]:
    """Kinds of the stages of `data` pipelines that take units kind by kind, and how many there are of each."""
    left = list(units)
    while data:
        order: list[int] = []
        for k, n in enumerate(left):
            order += [k] * min(n, depth - len(order))
        alike = min(data, left[order[0]] // depth) if order[0] == order[-1] else 1
        for k in set(order):
            left[k] -= alike * order.count(k)
        data -= alike
        yield tuple(order), alike


def _equal_shares(formed: Sequence[tuple[Formation, int]], micro_batches: int, data: int) -> tuple[Group, ...]:
    """Equal to within one micro-batch, the first pipelines having more."""
    each, more = divmod(micro_batches, data)
    groups: list[Group] = []
    for formation, count in formed:
        extra = min(more, count)
        more -= extra
        groups += [(formation, n, k) for n, k in ((extra, each + 1), (count - extra, each)) if n]
    return tuple(groups)


# ---------------------------------------------------------------- what becomes of a selection


def _plan(best: _Best, cluster: Cluster, work: Workload, bound_s: float) -> Plan:
    groups, scope = best.selection.groups, best.costs.scope
    data = sum(count for _, count, _ in groups)
    copies = max(1, data // best.parts)
    pipelines = [_pipeline(best.costs, work, group, data, copies) for group in groups]
    pipelines.sort(key=lambda p: -p.share)
    sum_s = max(formation.sum_s(data) for formation, _, _ in groups)
    tokens_per_s = work.tokens * sum(p.count * p.share for p in pipelines) / best.selection.step_s
    plan = Plan(scope.tensor, tuple(pipelines), copies, sum_s, best.selection.step_s, bound_s, tokens_per_s, ())
    plan = replace(plan, idle=tuple(_idle(plan, best, cluster)))
    return replace(plan, reason=explain(plan))


def _pipeline(costs: Costs, work: Workload, group: Group, data: int, copies: int) -> PipelinePlan:
    formation, count, share = group
    depth = len(formation.kinds)
    stages = [
        StagePlan(
            costs.scope.kinds[kind],
            cut,
            costs.passes(kind, *cut),
            stage_memory(work, cut, costs.scope.tensor, min(depth - s, share), copies / data),
        )
        for s, (kind, cut) in enumerate(zip(formation.kinds, formation.cuts, strict=True))
    ]
    compute_s = formation.finish_s(share) - formation.update_s
    return PipelinePlan(count, share, tuple(stages), compute_s, formation.update_s)


def _idle(plan: Plan, best: _Best, cluster: Cluster) -> Iterator[Idle]:
    """Devices without a place, by kind of node."""
    used: dict[NodeKind, int] = {}
    for pipeline in plan.pipelines:
        for stage in pipeline.stages:
            used[stage.node] = used.get(stage.node, 0) + pipeline.count * plan.tensor
    for node in dict.fromkeys(kind for kind, count in cluster.nodes if count):
        left = node.devices * sum(count for kind, count in cluster.nodes if kind == node) - used.get(node, 0)
        if left:
            yield Idle(node, left, _why_idle(node, left, plan, best))


def _why_idle(node: NodeKind, left: int, plan: Plan, best: _Best) -> str:
    if node.devices < plan.tensor:
        return f"its nodes have {node.devices} devices, and a TP group has {plan.tensor}"
    if node not in best.costs.scope.kinds:
        return "with its link the others would wait longer than it would save them"
    if plan.micro_batches == plan.data:
        return f"each of the {plan.micro_batches} micro-batches has a pipeline already"
    kind = best.costs.scope.kinds.index(node)
    alone_s = best.costs.seconds[kind][-1]
    whole = best.costs.bytes(0, best.costs.layers, 1, 1 / best.parts) - best.costs.scope.memory[kind]
    if whole > 0 and left == plan.tensor:
        return (
            f"the whole model is {whole / 2**30:.1f} GiB too large for it, and in a pipeline it would shorten no step"
        )
    if alone_s > plan.step_s:
        return f"a micro-batch takes it {alone_s:.4g} s, longer than a step, and in a pipeline it would shorten none"
    return "a pipeline with it would not make the step shorter"
