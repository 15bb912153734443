"""What came out of `evenkeel simulate`, for people and as JSON."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from math import inf, isfinite
from statistics import fmean
from typing import Any

from rich.console import Console

from evenkeel.plan.interval import duration
from evenkeel.sim.goodput.outages import DAY_S, Drawn, Repair, Trace
from evenkeel.sim.goodput.setting import CAUSES, Failures, Setting
from evenkeel.sim.goodput.study import WORTH, Estimate, Point, best, cheapest, enough, gain
from evenkeel.sim.goodput.theory import spares_needed
from evenkeel.tools.text import aligned, print_table

MEANING = {
    "productive": "steps that stay, at full pace",
    "degraded": "what they took longer with too few workers",
    "detect": "from a death to the word to stop",
    "rebuild": "from there to a world that trains",
    "redo": "steps that were taken back",
    "checkpoint": "held up by checkpoints and mirrors",
    "starved": "too few workers for any world",
    "other": "the first start, and what follows an early end",
}
NAMES = {
    "spares": "spares",
    "copies": "copies",
    "mirror_every": "mirror every",
    "interval": "checkpoint every",
}
MORE_IS_BETTER = ("spares", "copies")
MILLION = 1e6
SURE = 0.99
MOST_SEEDS = 10_000
"""That anybody would simulate."""


@dataclass(frozen=True, slots=True)
class Result:
    """All that was simulated.

    Attributes:
        base: the setting, but for what is varied.
        seeds: how many, from 0.
        axes: what is varied, in order.
        cpu_s: for each point, the CPU seconds of this process that its simulations took.
    """

    base: Setting
    seeds: int
    axes: tuple[str, ...]
    points: tuple[Point, ...]
    cpu_s: tuple[float, ...]


def show(result: Result) -> None:
    """To stdout."""
    print(headline(result))
    if len(result.points) == 1:
        _show_one(result)
    else:
        console = Console()
        head, rows = _sweep(result, console.width if console.is_terminal else None)
        print_table(head, rows, head)
    for line in answers(result):
        print(line)
    events = sum(o.events for point in result.points for o in point.outcomes)
    print(
        f"{events:,} events in {sum(result.cpu_s):.1f} s of CPU time, {_per_second(events, result.cpu_s):,.0f} a second"
    )


def headline(result: Result) -> str:
    base = result.base
    shape = f"{base.data} x {base.pipeline} x {base.tensor}"
    seeds = "1 seed" if result.seeds == 1 else f"{result.seeds} seeds"
    step = f"steps of {duration(base.step_s)}"
    return (
        f"{base.workers:,} workers (data x pipeline x tensor = {shape}), {step}, {duration(base.duration_s)}, {seeds}"
    )


def _show_one(result: Result) -> None:
    (point,) = result.points
    print(f"goodput {percent(point.goodput)}\n")
    rows = []
    for cause, share in point.shares.items():
        rows.append([cause, f"{100 * share:.2f} %", duration(share * result.base.duration_s), MEANING[cause]])
    print_table(("where time went", "share", "time", "what it is"), rows, ("share", "time"))
    print()
    print(f"incidents  {point.mean(lambda o: o.incidents):,.1f}{_went_back(point)}")
    print(f"steps      {point.mean(lambda o: o.steps):,.0f}, {point.mean(lambda o: o.tokens):.4g} tokens")
    if (cost := point.cost_per_token) is not None and cost.mean > 0:
        total = point.mean(lambda o: o.cost)
        print(f"cost       {total:,.2f}; per million tokens {_numbers(cost, MILLION, '.4g')}")
    for reason in dict.fromkeys(o.ended for o in point.outcomes if o.ended):
        print(f"ended      {sum(o.ended == reason for o in point.outcomes)} of {result.seeds}: {reason}")


def _went_back(point: Point) -> str:
    places = list(dict.fromkeys(place for o in point.outcomes for place in o.restores))
    counts = [(place, fmean(o.restores.get(place, 0) for o in point.outcomes)) for place in places]
    told = [f"{count:,.1f} to the {place}" for place, count in counts if count]
    return f"; went back {', '.join(told)}" if told else "; never went back"


def _sweep(result: Result, width: int | None) -> tuple[list[str], list[list[str]]]:
    """Head and rows: one for each point. Where it would be wider than that, small causes become one column."""
    most = {cause: max(point.shares[cause] for point in result.points) for cause in CAUSES[1:]}
    alone = [cause for cause in CAUSES[1:] if most[cause] >= 5e-5]
    rest: list[str] = []
    while True:
        head, rows = _columns(result, alone, rest)
        if width is None or len(alone) < 2 or len(aligned(head, rows)[0]) <= width:
            return head, rows
        least = min(alone, key=lambda cause: most[cause])
        alone.remove(least)
        rest.append(least)


def _columns(result: Result, alone: Sequence[str], rest: Sequence[str]) -> tuple[list[str], list[list[str]]]:
    costs = [point.cost_per_token for point in result.points]
    priced = any(cost is not None and cost.mean > 0 for cost in costs)
    head = [NAMES[axis] for axis in result.axes] + ["goodput %", "95 %", *alone, *(["rest"] if rest else [])]
    rows = []
    for point, cost in zip(result.points, costs, strict=True):
        row = [value_text(axis, point.varied[axis]) for axis in result.axes]
        row += [f"{100 * point.goodput.mean:.2f}", _interval(point.goodput)]
        row += [f"{100 * point.shares[cause]:.2f}" for cause in alone]
        row += [f"{100 * sum(point.shares[cause] for cause in rest):.2f}"] if rest else []
        row.append(f"{point.mean(lambda o: o.incidents):,.1f}")
        rows.append(row + ([f"{cost.mean * MILLION:.4g}" if cost else "-"] if priced else []))
    return [*head, "incidents", *(["per M tokens"] if priced else [])], rows


def answers(result: Result) -> list[str]:
    """What follows for each thing that was varied alone, and which costs least, in a sentence each."""
    if len(result.points) == 1:
        return []
    lines = []
    if len(result.axes) == 1:
        (axis,) = result.axes
        lines += _enough(result, axis) if axis in MORE_IS_BETTER else [_best(result)]
        lines += _in_repair(result.base) if axis == "spares" else []
    else:
        top = best(result.points)
        lines.append(f"Best: {_where(result, top)}, goodput {percent(top.goodput)}.")
    if (least := cheapest(result.points)) is not None and least.cost_per_token is not None:
        cost = _numbers(least.cost_per_token, MILLION, ".4g")
        lines.append(f"Cheapest: {_where(result, least)}, {cost} per million tokens.")
    return lines


def _enough(result: Result, axis: str) -> list[str]:
    found = enough(result.points, axis)
    point, worth = found.point, f"{100 * WORTH:g} points"
    said = f"{_where(result, point)}, goodput {percent(point.goodput)}"
    lines = []
    if found.undecided is not None:
        what, gains = _where(result, found.undecided), _gains(axis, found.unsure)
        known = f"{result.seeds} seeds do not tell whether {what} is enough, as more may gain {worth} ({gains})"
        lines.append(f"{known}; {_as_many(found.seeds)} would.")
    if found.more:
        sure = f"More gain less than {worth} ({_gains(axis, found.more)})."
        lines.append(f"Enough: {said}. {sure}")
    elif 1 - point.goodput.mean < WORTH:
        lines.append(f"Enough: {said}. More could not gain {worth}.")
    else:
        order = sorted(result.points, key=lambda p: inf if p.varied[axis] is None else p.varied[axis] or 0.0)
        step = f"{_points(gain(order[-2], point))} points over {value_text(axis, order[-2].varied[axis])}"
        lines.append(f"Not shown to be enough: {said}, the most that was tried, gains {step}.")
    if result.seeds == 1 and not isinstance(result.base.failures, Trace):
        lines.append("One seed does not tell how sure that is: --seeds 5 would.")
    return lines


def _gains(axis: str, gains: Sequence[tuple[Point, Estimate]]) -> str:
    return "; ".join(f"{value_text(axis, p.varied[axis])}: {_points(found)}" for p, found in gains)


def _as_many(seeds: float) -> str:
    return f"about {seeds:,.0f}" if seeds < MOST_SEEDS else f"not even {MOST_SEEDS:,}"


def _in_repair(base: Setting) -> list[str]:
    """What theory says of spares, where it does."""
    match base.failures:
        case Drawn(per_node_day, Repair(mean_s), _, 0.0) if isfinite(mean_s):
            most = spares_needed(len(base.nodes), per_node_day, mean_s / DAY_S, SURE)
            nodes = "node is" if most == 1 else "nodes are"
            return [f"By theory no more than {most} {nodes} in repair at the same time, {100 * SURE:g} % of the time."]
        case _:
            return []


def _best(result: Result) -> str:
    top = best(result.points)
    (axis,) = result.axes
    others = [p for p in result.points if p is not top]
    losses = [(value_text(axis, p.varied[axis]), gain(top, p)) for p in others]
    told = "; ".join(f"{value}: {_points(loss)}" for value, loss in losses)
    unsure = [value for value, loss in losses if loss.high is not None and loss.high >= 0]
    line = f"Best: {_where(result, top)}, goodput {percent(top.goodput)} (others, in points: {told})."
    return f"{line} Not worse for sure: {', '.join(unsure)}." if unsure else line


def _where(result: Result, point: Point) -> str:
    return ", ".join(f"{NAMES[axis]} {value_text(axis, point.varied[axis])}" for axis in result.axes)


def value_text(axis: str, value: int | None) -> str:
    """As it was given; what "the optimum" and "none" are called."""
    if axis == "copies" and value is None:
        return "all"
    if axis == "interval" and not value:
        return "none" if value is None else "optimum"
    if axis == "mirror_every" and not value:
        return "none"
    return f"{value:g}"


def percent(value: Estimate) -> str:
    return f"{100 * value.mean:.2f} %" + (f" (95 %: {_interval(value)})" if value.low is not None else "")


def _interval(value: Estimate) -> str:
    if value.low is None or value.high is None:
        return "-"
    return f"{100 * value.low:.2f} to {100 * value.high:.2f}"


def _points(value: Estimate) -> str:
    return f"{100 * value.mean:+.2f}" + (f" ({_interval(value)})" if value.low is not None else "")


def _numbers(value: Estimate, scale: float, form: str) -> str:
    text = format(value.mean * scale, form)
    if value.low is None or value.high is None:
        return text
    return f"{text} ({format(value.low * scale, form)} to {format(value.high * scale, form)})"


def _per_second(events: int, cpu_s: Sequence[float]) -> float:
    return events / max(sum(cpu_s), 1e-9)


# ---------------------------------------------------------------- JSON


def record(result: Result) -> dict[str, Any]:
    """Stable keys: tools read them. Times are seconds, shares 0 to 1, None where there is no value."""
    base = result.base
    names = ("devices_per_node", "data", "pipeline", "tensor", "micro_batches", "step_s", "tokens_per_step")
    more = ("duration_s", "min_workers", "per_node", "price_per_device_hour")
    setting = {name: getattr(base, name) for name in (*names, *more)}
    setting |= {
        "nodes": len(base.nodes),
        "failures": _failures(base.failures),
        "workers": base.workers,
        "seeds": result.seeds,
        "costs": asdict(base.costs),
        "slower": dict(base.slower),
    }
    points = [_point(point, cpu) for point, cpu in zip(result.points, result.cpu_s, strict=True)]
    return {"setting": setting, "varied": list(result.axes), "points": points, "answers": answers(result)}


def _failures(failures: Failures) -> dict[str, Any]:
    match failures:
        case Drawn(per_node_day, repair, rack, rack_share):
            hours = repair.mean_s / 3600 if isfinite(repair.mean_s) else None
            drawn = {"per_node_day": per_node_day, "repair_hours": hours}
            return {**drawn, "rack": rack, "rack_share": rack_share}
        case Trace(name):
            return {"trace": name}
        case _:
            return {}


def _point(point: Point, cpu_s: float) -> dict[str, Any]:
    cost, outcomes = point.cost_per_token, point.outcomes
    places = dict.fromkeys(place for o in outcomes for place in o.restores)
    events = sum(o.events for o in outcomes)
    return {
        "varied": dict(point.varied),
        "goodput": asdict(point.goodput),
        "seconds": {cause: fmean(o.seconds[cause] for o in outcomes) for cause in CAUSES},
        "steps": point.mean(lambda o: o.steps),
        "tokens": point.mean(lambda o: o.tokens),
        "device_hours": point.mean(lambda o: o.device_seconds / 3600),
        "cost": point.mean(lambda o: o.cost),
        "cost_per_token": None if cost is None else asdict(cost),
        "incidents": point.mean(lambda o: o.incidents),
        "restores": {place: fmean(o.restores.get(place, 0) for o in outcomes) for place in places},
        "events": events,
        "messages": sum(o.messages for o in outcomes),
        "cpu_s": cpu_s,
        "events_per_s": _per_second(events, [cpu_s]),
        "ended": [o.ended for o in outcomes],
        "goodput_by_seed": [o.goodput for o in outcomes],
    }
