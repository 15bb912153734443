"""All pipelines of few stages and layers that are not worse than another of the same devices in everything.

Beside the pace of the slowest stage a step depends on the time through all stages, on the sum of gradients of the
largest one, and on the micro-batches for which there is memory. Layers are dealt out from the last stage to the first,
and of what has been dealt out to the same units down to the same layer, what is worse in everything is left out.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from operator import le

from evenkeel.plan.scopes import Costs, Formation

Count = tuple[int, ...]
"""Units of each kind."""

MOST_WORK = 300
"""Stages times the square of the number of layers, at most."""


@dataclass(frozen=True, slots=True)
class _Part:
    """The last stages of a pipeline.

    Attributes:
        costs: that are to be small: the slowest stage, all stages, the most elements of a stage on each kind, and the
            micro-batches for which there is no memory.
    """

    costs: tuple[float, ...]
    kinds: tuple[int, ...]
    cuts: tuple[tuple[int, int], ...]


def covers(costs: Costs, count: Count) -> bool:
    """Whether all pipelines of so many units are looked at; if so, then also of fewer."""
    return sum(count) * costs.layers**2 <= MOST_WORK


def trade_offs(costs: Costs, owned: float, counts: Sequence[Count]) -> Iterator[Formation]:
    """Of each count that is covered.

    Args:
        counts: fewer units first, none at all first of all; with each count all that are fewer.
    """
    nothing = _Part((0.0,) * (3 + len(costs.scope.kinds)), (), ())
    parts: dict[Count, dict[int, list[_Part]]] = {counts[0]: {costs.layers: [nothing]}}
    for count in counts[1:]:
        if covers(costs, count) and sum(count) <= costs.layers:
            parts[count] = {
                start: _best(found) for start, found in _longer(costs, owned, parts, count).items() if found
            }
            for part in parts[count].get(0, ()):
                yield costs.formation(part.kinds, part.cuts, costs.scope.micro_batches - int(part.costs[2]))


def _longer(
    costs: Costs, owned: float, parts: dict[Count, dict[int, list[_Part]]], count: Count
) -> dict[int, list[_Part]]:
    """With one stage more before those of one unit less, by its first layer."""
    found: dict[int, list[_Part]] = {start: [] for start in range(costs.layers)}
    for kind, n in enumerate(count):
        fewer = (*count[:kind], n - 1, *count[kind + 1 :])
        for stop, some in parts.get(fewer, {}).items():
            for start in range(stop):
                lacks = costs.scope.micro_batches - costs.most_of_stage(kind, (start, stop), sum(count), owned)
                if lacks == costs.scope.micro_batches:
                    continue
                time_s, elements = costs.stage_s(kind, start, stop), costs.elements[stop] - costs.elements[start]
                for part in some:
                    slowest, all_s, without, *most = part.costs
                    most[kind] = max(most[kind], elements)
                    now = (max(slowest, time_s), all_s + time_s, max(without, lacks), *most)
                    found[start].append(_Part(now, (kind, *part.kinds), ((start, stop), *part.cuts)))
    return found


def _best(parts: Sequence[_Part]) -> list[_Part]:
    """Without those that are worse than another in everything, or equal to it."""
    kept: list[_Part] = []
    for part in sorted(parts, key=lambda part: part.costs):
        if not any(all(map(le, other.costs, part.costs)) for other in kept):
            kept.append(part)
    return kept
