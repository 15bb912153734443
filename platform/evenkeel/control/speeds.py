"""What the controller makes of what workers measure: an average for each, that nothing of a moment moves."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median

from evenkeel.core.ids import WorkerId
from evenkeel.core.layout import Layout, Stage
from evenkeel.core.vote import Timing
from evenkeel.plan.speeds import Speeds

SAMPLES = 3
"""In a row that are off the average on the same side: then it is not a moment but another speed."""
TOLERANCE = 0.1
"""What is less off than this part of the average moves it."""
WEIGHT = 0.3
"""Of the newest in the exponential average."""
SLOW_LINK = 4.0
"""A link is called slow if it is so many times slower than links of its kind have been."""


@dataclass(slots=True)
class Average:
    """Exponential, of samples that are near it. Others are put aside, until SAMPLES in a row are off on one side: then
    their median is the new average. So a worker that is slow for a moment is not slow."""

    value: float | None = None
    aside: list[float] = field(default_factory=list)

    def add(self, sample: float) -> None:
        value = self.value
        if value is not None and abs(sample - value) <= TOLERANCE * value:
            self.value = value + WEIGHT * (sample - value)
            self.aside.clear()
            return
        if value is not None and self.aside and (self.aside[-1] > value) != (sample > value):
            self.aside.clear()
        self.aside.append(sample)
        if len(self.aside) == SAMPLES:
            self.value = median(self.aside)
            self.aside.clear()


@dataclass(slots=True)
class _Worker:
    """What is known of a worker in one place.

    Attributes:
        place: the layers of its stage, and its TP degree: in another place it takes another time.
        parts: its layers' parts of a pass.
    """

    place: tuple[int, int, int]
    pass_s: Average = field(default_factory=Average)
    receive_s: Average = field(default_factory=Average)
    parts: tuple[float, ...] = ()


@dataclass
class Tracker:
    """All that was measured in this life of the controller.

    Attributes:
        costs: of the layers; by the model, or a profile, where nothing was measured.
        kinds: see Speeds.
        paces: seconds per unit of cost, also of workers that have no place now.
        rates: bytes per second of the links, by sender and receiver; best: the highest that each has had.
        slow: links that were told to be slow.
    """

    costs: tuple[float, ...]
    kinds: Mapping[str, float] = field(default_factory=dict)
    workers: dict[WorkerId, _Worker] = field(default_factory=dict)
    paces: dict[WorkerId, float] = field(default_factory=dict)
    rates: dict[tuple[WorkerId, WorkerId], Average] = field(default_factory=dict)
    best: dict[tuple[WorkerId, WorkerId], float] = field(default_factory=dict)
    slow: set[tuple[WorkerId, WorkerId]] = field(default_factory=set)

    def opened(self, layout: Layout) -> None:
        """Who has another place now is expected to be as fast there as before."""
        expected = self.speeds()
        for stage in _stages(layout):
            place = (stage.start, stage.stop, len(stage.members))
            for worker in stage.members:
                known = self.workers.get(worker)
                if known is not None and known.place == place:
                    known.pass_s.aside.clear()
                    continue
                self.workers[worker] = _Worker(place)
                if worker in expected.paces:
                    cost = sum(expected.costs[stage.start : stage.stop])
                    self.workers[worker].pass_s.value = expected.paces[worker] * cost or None

    def lost(self, worker: WorkerId) -> None:
        self.workers.pop(worker, None)
        self.paces.pop(worker, None)
        for link in [link for link in self.rates if worker in link]:
            del self.rates[link]
            self.best.pop(link, None)
            self.slow.discard(link)

    def heard(self, timings: Iterable[Timing]) -> None:
        for timing in timings:
            known = self.workers.get(timing.worker)
            if known is None:
                continue
            if timing.pass_s > 0:
                known.pass_s.add(timing.pass_s)
                known.receive_s.add(timing.receive_s)
            if timing.layers and sum(timing.layers) > 0:
                known.parts = _averaged(known.parts, [part / sum(timing.layers) for part in timing.layers])
            if timing.source is not None:
                link = (timing.source, timing.worker)
                average = self.rates.setdefault(link, Average())
                average.add(timing.bytes_per_s)
                self.best[link] = max(self.best.get(link, 0.0), average.value or 0.0)
        self._explain()

    def speeds(self) -> Speeds:
        """What is known now."""
        receives = {w: x.receive_s.value for w, x in self.workers.items() if x.receive_s.value}
        return Speeds(self.costs, dict(self.paces), receives, self.kinds)

    def _explain(self) -> None:
        """Finds paces of the workers and costs of the layers of which each measured time is the product.

        Where nothing but what was known before says how the layers of two stages compare, that does: what was measured
        when they were elsewhere, at first the model's word or the profile's. A worker's pace is first the median over
        its layers, each as often as it costs, as a cost that is wrong for one of them must not make it slow; then its
        whole time over the costs that follow from that.
        """
        known = {w: x for w, x in self.workers.items() if x.pass_s.value is not None}
        paces = {worker: _first_pace(x, self.costs) for worker, x in known.items()}
        self.costs = _costs(known, paces, self.costs)
        for worker, x in known.items():
            assert x.pass_s.value is not None
            self.paces[worker] = x.pass_s.value / (sum(self.costs[x.place[0] : x.place[1]]) or 1.0)

    def slow_links(self, node_of: dict[WorkerId, str]) -> list[tuple[WorkerId, WorkerId, float, float]]:
        """Links that have become slow since they were asked for last: sender, receiver, bytes per second, and what
        links of that kind (within nodes, or between them) have had."""
        alike: dict[bool, list[float]] = {True: [], False: []}
        for link, rate in self.best.items():
            if rate:
                alike[_inside(link, node_of)].append(rate)
        usual = {inside: median(rates) for inside, rates in alike.items() if rates}
        found: list[tuple[WorkerId, WorkerId, float, float]] = []
        for link, average in self.rates.items():
            inside = _inside(link, node_of)
            if average.value is None or inside not in usual:
                continue
            if average.value * SLOW_LINK > usual[inside]:
                self.slow.discard(link)
            elif link not in self.slow:
                self.slow.add(link)
                found.append((*link, average.value, usual[inside]))
        return found


def _inside(link: tuple[WorkerId, WorkerId], node_of: dict[WorkerId, str]) -> bool:
    return node_of.get(link[0]) == node_of.get(link[1])


def _stages(layout: Layout) -> Iterable[Stage]:
    return (stage for pipeline in layout.pipelines for stage in pipeline.stages)


def _averaged(before: Sequence[float], now: Sequence[float]) -> tuple[float, ...]:
    if len(before) != len(now):
        return tuple(now)
    return tuple(old + WEIGHT * (new - old) for old, new in zip(before, now, strict=True))


def _first_pace(known: _Worker, prior: Sequence[float]) -> float:
    assert known.pass_s.value is not None
    costs = prior[known.place[0] : known.place[1]]
    measured = zip(known.parts, costs, strict=False)
    by_layer = sorted((known.pass_s.value * part / cost, cost) for part, cost in measured if cost > 0)
    below = 0.0
    for pace, cost in by_layer:
        below += cost
        if 2 * below >= sum(costs):
            return pace
    return known.pass_s.value / (sum(costs) or 1.0)


def _costs(known: dict[WorkerId, _Worker], paces: dict[WorkerId, float], prior: Sequence[float]) -> tuple[float, ...]:
    """By layer the median over those who measured it, else the model's word."""
    seen: list[list[float]] = [[] for _ in prior]
    for worker, x in known.items():
        if x.pass_s.value is None or not paces[worker] > 0:
            continue
        for i, part in enumerate(x.parts):
            seen[x.place[0] + i].append(x.pass_s.value * part / paces[worker])
    return tuple(median(costs) if costs else cost for costs, cost in zip(seen, prior, strict=True))
