"""The layout planner: pipelines, stages and TP groups for the workers that are here, and their shares."""

from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from evenkeel.core.ids import WorkerId
from evenkeel.core.layout import Layout, Pipeline, Stage, WorkerInfo
from evenkeel.core.model import ModelShape
from evenkeel.plan.assign import Seat, assign
from evenkeel.plan.batch import shares
from evenkeel.plan.cuts import Cuts, most_stages, slowest_stage, stage_cuts
from evenkeel.plan.speeds import MIN_GAIN, Fits, Speeds, all_fit, anything, recut_by, with_shares
from evenkeel.plan.units import Unit, form_units


@dataclass(frozen=True, slots=True)
class Wish:
    """What the user asks for.

    Attributes:
        data, pipeline: degrees at full strength; with fewer workers they give way. None: as it comes out when
            everybody gets a place.
        tensor: the TP degree, which does not give way. None: the previous layout's, at first 1.
        min_workers: with fewer places than this the run waits.
        max_workers: more than this get no place.

    Raises:
        ValueError: if a number is below 1, or min_workers is above max_workers.
    """

    data: int | None
    pipeline: int | None
    tensor: int | None
    min_workers: int
    max_workers: int

    def __post_init__(self) -> None:
        for name in ("data", "pipeline", "tensor", "min_workers", "max_workers"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}; it must be at least 1")
        if self.min_workers > self.max_workers:
            raise ValueError(f"min_workers {self.min_workers} is above max_workers {self.max_workers}")


@dataclass(frozen=True, slots=True)
class Planned:
    """A layout, why it is this one, and who has no place in it (in order of preference).

    Attributes:
        fits: whether every stage has the memory for its layers.
    """

    layout: Layout
    reason: str
    unused: tuple[WorkerId, ...]
    fits: bool = True


@dataclass(frozen=True, slots=True)
class Infeasible:
    """No layout is possible; the reason says what is waited for.

    Attributes:
        short_bytes: that each device lacks; 0 where memory is not why.
    """

    reason: str
    short_bytes: int = 0


@dataclass(frozen=True, slots=True)
class _Limits:
    """How far pipelines may go: the wish, and what micro-batches and layers allow."""

    pipelines: int
    stages: int
    units: int

    def __str__(self) -> str:
        return f"at most {_count(self.pipelines, 'pipeline')} of {_count(self.stages, 'stage')}"


def plan_layout(
    workers: Sequence[WorkerInfo],
    wish: Wish,
    model: ModelShape,
    micro_batches: int,
    previous: Layout | None,
    speeds: Speeds | None = None,
    room: Callable[[Layout], Fits] = lambda _: anything,
) -> Planned | Infeasible:
    """The layout for who is here.

    As many workers as the wish and the model allow get a place, in pipelines whose depths differ by at most one stage;
    no deeper than there are layers with work, no more of them than micro-batches. Of the numbers of pipelines that
    this leaves open, the one with the smallest slowest finish is taken if both degrees are wished, the one nearest to
    the wished depth if only that is, and the largest otherwise. Stages are cut by `cuts`, shares come from `batch`.

    Whoever has a place in `previous` that the new layout has too (same layers, same index of pipeline and stage)
    keeps it, and the first one without a place takes a free one. So a spare that replaces a dead worker gets exactly
    its rank and its share, and the run stays bitwise the same.

    Args:
        workers: who is ready, in order of preference: members first, then spares. Only those with the members' kind of
            device are used, at first the most frequent one.
        previous: the layout to stay close to; of its members only those in `workers` are alive.
        speeds: as far as they are measured. A layout of the previous one's shape keeps its cuts and shares then;
            another one gets such by speed, where they differ. None: all are taken for equal.
        room: which cuts of a layout's stages its members have the memory for; see memory.stage_fits. What does not fit
            is cut again, and if that does not help, in fewer and deeper pipelines; if nothing does, it stays as it is.

    Raises:
        ValueError: if there is no micro-batch, or a layer's cost is negative.
    """
    if micro_batches < 1:
        raise ValueError(f"{micro_batches} micro-batches are to be shared out; at least 1 is needed")
    tensor = wish.tensor or (previous.tensor if previous else 1)
    if model.tensor_divides % tensor:
        return Infeasible(f"TP degree {tensor} does not divide {model.tensor_divides} (heads, widths): no worker helps")
    costs = _costs(model)
    limits = _limits(wish, costs, micro_batches, tensor)
    if limits.units < 1:
        return Infeasible(f"max_workers {wish.max_workers} does not hold one TP group of {tensor}: no worker helps")
    usable = _of_one_device(workers, previous)
    units = form_units(usable, tensor, previous)[: limits.units]
    # More than there are places for is never waited for.
    needed = min(-(-wish.min_workers // tensor), limits.units)
    if len(units) < needed:
        return Infeasible(_waits(len(workers), len(usable), len(units), tensor, needed))
    most = _pipelines(len(units), wish, limits, costs, micro_batches)
    known = None if speeds is None else speeds.for_all(usable)

    def arranged(pipelines: int) -> tuple[Layout, bool]:
        return _arrange(units, _depths(len(units), pipelines), model, micro_batches, previous, known, room)

    layout, fit = arranged(most)
    if not fit:
        deeper = range(-(-len(units) // limits.stages), most)
        fitting = bisect_left(deeper, True, key=lambda n: not arranged(n)[1])
        layout, fit = arranged(deeper[fitting - 1]) if fitting else (layout, fit)
    unused = tuple(w.worker_id for w in workers if w.worker_id not in layout.places)
    return Planned(layout, _reason(layout, wish, limits, len(workers), previous), unused, fit)


def _arrange(
    units: Sequence[Unit],
    depths: Sequence[int],
    model: ModelShape,
    micro_batches: int,
    previous: Layout | None,
    speeds: Speeds | None,
    room: Callable[[Layout], Fits],
) -> tuple[Layout, bool]:
    """Pipelines of these depths, with cuts by which every stage fits if there are any; and whether it does."""
    costs, tensor = _costs(model), len(units[0].members)
    same = speeds is not None and previous is not None and _has_shape(previous, depths, tensor)
    cuts = _cuts_of(previous) if same and previous else [stage_cuts(costs, depth) for depth in depths]
    layout = _build(units, cuts, costs, model, micro_batches, previous)
    if same and previous:
        layout = with_shares(layout, [pipeline.share for pipeline in previous.pipelines])
    fits = room(layout)
    if not all_fit(layout, fits):
        layout = recut_by(layout, speeds or Speeds(costs, dict.fromkeys(layout.members, 1.0)), fits)
        return layout, all_fit(layout, fits)
    return (layout if speeds is None or same else _by_speed(layout, speeds, fits)), True


def _has_shape(layout: Layout, depths: Sequence[int], tensor: int) -> bool:
    return layout.tensor == tensor and [len(pipeline.stages) for pipeline in layout.pipelines] == list(depths)


def _cuts_of(layout: Layout) -> list[Cuts]:
    return [tuple((stage.start, stage.stop) for stage in pipeline.stages) for pipeline in layout.pipelines]


def _by_speed(layout: Layout, speeds: Speeds, fits: Fits) -> Layout:
    """Other shares, or cuts and shares, where that wins enough: equal workers get equal work, whatever was measured."""
    now_s = speeds.finish_s(layout)
    for changed in (speeds.shared(layout), recut_by(layout, speeds, fits)):
        if speeds.finish_s(changed) <= (1 - MIN_GAIN) * now_s:
            layout, now_s = changed, speeds.finish_s(changed)
    return layout


def _costs(model: ModelShape) -> tuple[float, ...]:
    costs = tuple(layer.cost for layer in model.layers)
    return costs if any(costs) else (1.0,) * len(costs)


def _limits(wish: Wish, costs: Sequence[float], micro_batches: int, tensor: int) -> _Limits:
    pipelines = min(wish.data or micro_batches, micro_batches)
    stages = min(wish.pipeline or len(costs), most_stages(costs))
    return _Limits(pipelines, stages, min(pipelines * stages, wish.max_workers // tensor))


def _of_one_device(workers: Sequence[WorkerInfo], previous: Layout | None) -> list[WorkerInfo]:
    """Those of one device, as a process group cannot mix them: the members' device, else the most frequent one."""
    if len({worker.device for worker in workers}) == 1:
        return list(workers)
    members = [worker for worker in workers if previous and worker.worker_id in previous.places]
    count = Counter(worker.device for worker in members or workers)
    device = max(count, key=lambda d: count[d], default="")  # ties go to the first
    return [worker for worker in workers if worker.device == device]


def _pipelines(units: int, wish: Wish, limits: _Limits, costs: tuple[float, ...], micro_batches: int) -> int:
    """How many pipelines the units form."""
    fewest, most = -(-units // limits.stages), min(limits.pipelines, units)
    if wish.pipeline is None:
        return most
    if wish.data is None:
        return fewest
    finish = {n: _finish(_depths(units, n), costs, micro_batches) for n in range(fewest, most + 1)}
    best = min(finish.values())
    return max(n for n in finish if finish[n] <= best * (1 + 1e-9))


def _depths(units: int, pipelines: int) -> tuple[int, ...]:
    """As equal as can be, the deeper ones first."""
    each, more = divmod(units, pipelines)
    return (each + 1,) * more + (each,) * (pipelines - more)


def _finish(depths: Sequence[int], costs: tuple[float, ...], micro_batches: int) -> float:
    """The slowest finish under the best shares of at least one each: `batch.shares`, by kinds of equal pipelines."""
    kinds = list(Counter(depths).items())
    times = [slowest_stage(costs, stage_cuts(costs, depth)) for depth, _ in kinds]
    given = [1] * len(kinds)
    left = micro_batches - len(depths)
    while left > 0:
        _, i = min((_ends(costs, times[i], given[i] + 1), i) for i in range(len(kinds)))
        given[i] += 1
        left -= kinds[i][1]
    return max(_ends(costs, time, k) for time, k in zip(times, given, strict=True))


def _ends(costs: Sequence[float], slowest: float, share: int) -> float:
    """When a pipeline is done: its bubble, and its share at the pace of its slowest stage."""
    return _bubble(costs, slowest) + share * slowest


def _bubble(costs: Sequence[float], slowest: float) -> float:
    return max(0.0, sum(costs) - slowest)


def _build(
    units: Sequence[Unit],
    cuts: Sequence[Cuts],
    costs: Sequence[float],
    model: ModelShape,
    micro_batches: int,
    previous: Layout | None,
) -> Layout:
    times = [slowest_stage(costs, cut) for cut in cuts]
    counts = shares(times, micro_batches, 1, [_bubble(costs, time) for time in times])
    seats = [[Seat(i, j, layers) for j, layers in enumerate(cut)] for i, cut in enumerate(cuts)]
    members = assign(units, [seat for row in seats for seat in row], model, previous)
    pipelines: list[Pipeline] = []
    micro = 0
    for row, count in zip(seats, counts, strict=True):
        stages = tuple(Stage(*seat.layers, members[seat]) for seat in row)
        pipelines.append(Pipeline(stages, micro, micro + count))
        micro += count
    return Layout(tuple(pipelines))


def _waits(here: int, usable: int, units: int, tensor: int, needed: int) -> str:
    device = f", {usable} of them of one kind of device" if usable < here else ""
    groups = f", which form {_count(units, 'TP group')} of {tensor} within a node" if tensor > 1 else ""
    more = _count((needed - units) * tensor, "more worker")
    return f"waits for {more}: {needed * tensor} are needed, {here} are here{device}{groups}"


def _reason(layout: Layout, wish: Wish, limits: _Limits, here: int, previous: Layout | None) -> str:
    places = len(layout.members)
    text = f"{_shape(layout)}: {places} of {here} workers"
    if places == limits.units * layout.tensor:
        capped = wish.max_workers < limits.pipelines * limits.stages * layout.tensor
        text += f", as many as max_workers {wish.max_workers} allows" if capped else f", all places of {limits}"
    elif places < here:
        text += ", the others do not fill a TP group" if layout.tensor > 1 else ", the others have another device"
    else:
        text += f", everybody who is here, in {limits}"
    return text if previous is None else f"{text}; {_change(layout, previous)}"


def _shape(layout: Layout) -> str:
    kinds = Counter(len(pipeline.stages) for pipeline in layout.pipelines)
    depths = " and ".join(f"{_count(n, 'pipeline')} of {_count(depth, 'stage')}" for depth, n in kinds.items())
    counts = [pipeline.share for pipeline in layout.pipelines]
    low, high = min(counts), max(counts)
    share = f"{low} to {high}" if low < high else f"{low}"
    tensor = f", TP {layout.tensor}" if layout.tensor > 1 else ""
    return f"{depths}{tensor}, {share} micro-batches each"


def _change(layout: Layout, previous: Layout) -> str:
    """What became of the previous layout, in words; names at most three workers."""
    ends, ended = ([pipeline.micro_stop for pipeline in each.pipelines] for each in (layout, previous))
    if layout.shape != previous.shape or ends != ended:
        stays = sum(previous.shards.get(worker) == shard for worker, shard in layout.shards.items())
        return f"another shape than before, {stays} workers keep their layers"
    swaps = [(new, old) for new, old in zip(layout.members, previous.members, strict=True) if new != old]
    if not swaps:
        return "as before"
    names = ", ".join(f"{new} takes the place of {old} (rank {layout.places[new].rank})" for new, old in swaps[:3])
    return f"shape as before, {names}" + (f" and {len(swaps) - 3} more" if len(swaps) > 3 else "")


def _count(n: int, word: str) -> str:
    return f"{n} {word}" if n == 1 else f"{n} {word}s"
