"""What steps, repairs, checkpoints and starts took in a real run, as its directory tells: costs for the simulator."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import fmean
from typing import Any

from evenkeel.control.incident import PLANNED
from evenkeel.observe.incident import phase_times, total_s, unplanned
from evenkeel.sim.goodput.costs import Costs
from evenkeel.store.errors import StoreError
from evenkeel.store.run_directory import RunDirectory
from evenkeel.store.untrusted import short

Record = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Measured:
    """Of one run.

    Attributes:
        by_size: mean step by the number of workers, but for the first of each world and those after a checkpoint.
        repairs: that were measured; with none of them their costs are 0.
    """

    by_size: Mapping[int, float]
    costs: Costs
    repairs: int

    @property
    def step_s(self) -> float:
        """With the most workers."""
        return self.by_size[max(self.by_size)]


def measured_in(run: str) -> Measured:
    """Raises StoreError, in one line, if there is no run, no step in it, or something that no run writes."""
    directory = RunDirectory.at(run)
    if directory.read_run() is None:
        raise StoreError(f"{directory.url}: no run here (there is no run.json)")
    # All steps, also those that were taken back.
    metrics, events = directory.follow("metrics").poll(), directory.events()
    try:
        return measured(metrics, events, directory.fault_times())
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        what = f"its metrics or events do not tell what steps and repairs took: {type(error).__name__}: {short(error)}"
        raise StoreError(f"{directory.url}: {what}") from None


def measured(metrics: Sequence[Record], events: Sequence[Record], faults: Sequence[float] = ()) -> Measured:
    """Means over all that happened, as what they add up to is a total.

    Args:
        metrics: all lines, in the order in which they were written.
        faults: when configured faults happened, in unix seconds.

    Raises:
        ValueError: if no step was measured.
    """
    saved = {(line["generation"], line["checkpoint"]) for line in events if line["event"] == "checkpoint_started"}
    usual = _usual(metrics, saved)
    full = max((line["world_size"] for line in metrics), default=0)
    if not usual.get(full):
        raise ValueError("two steps in a row, in one world, are needed")
    repairs = list(_repairs(events))
    phases = [spent for spent, _ in repairs]
    moved = [spent["reshard"] for spent, went_back in repairs if spent["reshard"] and not went_back]
    read = [spent["reshard"] for spent, went_back in repairs if went_back]
    mean = {name: _mean([p[name] for p in phases]) for name in phases[0]} if phases else {}
    saves = [line["seconds"] for line in events if line["event"] == "checkpoint_committed" and "seconds" in line]
    stall_s = max(0.0, _mean(list(_stalls(metrics, saved, usual))))
    costs = Costs(
        detect_s=max(0.0, _mean(list(_detections(metrics, events, faults, usual)))),
        abort_s=mean.get("abort", 0.0),
        settle_s=mean.get("settle", 0.0),
        plan_s=mean.get("plan", 0.0),
        regroup_s=mean.get("regroup", 0.0),
        reshard_s=_mean(moved),
        first_step_s=max(0.0, _mean(list(_first_steps(metrics, events, usual)))),
        start_s=_mean(list(_starts(events))),
        restore_s=_mean(read),
        save_stall_s=stall_s,
        save_write_s=max(0.0, _mean(saves) - stall_s),
    )
    return Measured(usual, costs, len(repairs))


def _later_steps(metrics: Sequence[Record]) -> Iterator[Record]:
    """Those that follow a step of the same generation: the first of a world takes a repair longer."""
    for before, line in pairwise(metrics):
        if line["generation"] == before["generation"] and line["step_s"] is not None:
            yield line


def _repairs(events: Sequence[Record]) -> Iterator[tuple[dict[str, float], bool]]:
    """Each repair's phases, and whether the run went back for it to a checkpoint, or to mirrors."""
    went_back = False
    for line in events:
        went_back |= line["event"] == "restored"
        if line["event"] == "incident":
            if line["cause"] not in PLANNED:
                yield phase_times(line), went_back
            went_back = False


def _usual(metrics: Sequence[Record], saved: Collection[tuple[int, int]]) -> dict[int, float]:
    """By the number of workers; of steps after checkpoints only where there are no others."""
    found: dict[int, dict[bool, list[float]]] = {}
    for line in _later_steps(metrics):
        size = found.setdefault(line["world_size"], {False: [], True: []})
        size[_after(line, saved)].append(line["step_s"])
    return {size: fmean(steps[False] or steps[True]) for size, steps in found.items()}


def _after(line: Record, saved: Collection[tuple[int, int]]) -> bool:
    """Whether a checkpoint was begun between this step and the one before."""
    return (line["generation"], line["step"] - 1) in saved


def _detections(
    metrics: Sequence[Record], events: Sequence[Record], faults: Sequence[float], usual: Mapping[int, float]
) -> Iterator[float]:
    """Seconds from each failure of a world that trained to the controller that broke it.

    A death is noticed, but not when it happened: known is the commit before it. What lies between these two is lost
    with the open step, and the simulator counts it as that. A configured fault tells when it happened; all others come
    at any time, so half a step after the commit on average: single ones may be negative here.
    """
    formed = [line["time"] for line in events if line["event"] == "world_formed"]
    for line in unplanned(events):
        broken_at = line["time"] - total_s(line) + phase_times(line)["detect"]
        before = max((x for x in metrics if x["time"] <= broken_at), key=lambda x: x["time"], default=None)
        if before is None or line["rolled_forward"] or any(before["time"] < at < broken_at for at in formed):
            continue  # no step was open, or it was not lost
        happened = [at for at in faults if before["time"] <= at <= broken_at]
        yield broken_at - (happened[0] if happened else before["time"] + usual.get(before["world_size"], 0.0) / 2)


def _first_steps(metrics: Sequence[Record], events: Sequence[Record], usual: Mapping[int, float]) -> Iterator[float]:
    """By how much the first step after each repair took longer than others of its world's size, where there were."""
    sizes = {line["generation"]: line["world_size"] for line in metrics}
    for line in unplanned(events):
        size = sizes.get(line["generation"], 0)
        if size in usual:
            yield phase_times(line)["first_step"] - usual[size]


def _starts(events: Sequence[Record]) -> Iterator[float]:
    """Seconds from each loss of a worker to the start of one in its stead, in order."""
    formed = next((i for i, line in enumerate(events) if line["event"] == "world_formed"), len(events))
    lost: list[float] = []
    for line in events[formed:]:
        if line["event"] == "worker_lost":
            lost.append(line["time"])
        elif line["event"] == "worker_started" and lost:
            yield max(0.0, line["time"] - lost.pop(0))


def _stalls(
    metrics: Sequence[Record], saved: Collection[tuple[int, int]], usual: Mapping[int, float]
) -> Iterator[float]:
    """By how much the step after each checkpoint's was longer than usual."""
    return (x["step_s"] - usual[x["world_size"]] for x in _later_steps(metrics) if _after(x, saved))


def _mean(values: Sequence[float]) -> float:
    return fmean(values) if values else 0.0
