"""What steps, repairs, checkpoints and starts took in a real run, as its directory tells: costs for the simulator."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import fmean, median
from typing import Any

from evenkeel.control.incident import PLANNED
from evenkeel.observe.incident import phase_times
from evenkeel.sim.goodput.costs import Costs
from evenkeel.store.errors import StoreError
from evenkeel.store.run_directory import RunDirectory
from evenkeel.store.untrusted import short

Record = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Measured:
    """Of one run.

    Attributes:
        step_s: median of the steps with the most workers, the first of each world aside.
        repairs: that were measured; with none of them their costs are 0.
    """

    step_s: float
    costs: Costs
    repairs: int


def measured_in(run: str) -> Measured:
    """Raises StoreError, in one line, if there is no run, no step in it, or something that no run writes."""
    directory = RunDirectory.at(run)
    if directory.read_run() is None:
        raise StoreError(f"{directory.url}: no run here (there is no run.json)")
    metrics, events = directory.metrics(), directory.events()
    try:
        return measured(metrics, events)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        what = f"its metrics or events do not tell what steps and repairs took: {type(error).__name__}: {short(error)}"
        raise StoreError(f"{directory.url}: {what}") from None


def measured(metrics: Sequence[Record], events: Sequence[Record]) -> Measured:
    """Means over all that happened, as many small costs add up to a total; of steps the median.

    Raises:
        ValueError: if no step was measured.
    """
    full = max((line["world_size"] for line in metrics), default=0)
    step_s = [line["step_s"] for line in _later_steps(metrics) if line["world_size"] == full]
    if not step_s:
        raise ValueError("two steps in a row, in one world, are needed")
    usual_s = median(step_s)
    repairs = list(_repairs(events))
    phases = [spent for spent, _ in repairs]
    moved = [spent["reshard"] for spent, went_back in repairs if not went_back]
    read = [spent["reshard"] for spent, went_back in repairs if went_back]
    mean = {name: _mean([p[name] for p in phases]) for name in phases[0]} if phases else {}
    saves = [line["seconds"] for line in events if line["event"] == "checkpoint_committed" and "seconds" in line]
    costs = Costs(
        detect_s=mean.get("detect", 0.0),
        abort_s=mean.get("abort", 0.0),
        settle_s=mean.get("settle", 0.0),
        plan_s=mean.get("plan", 0.0),
        regroup_s=mean.get("regroup", 0.0),
        reshard_s=_mean(moved),
        first_step_s=max(0.0, mean.get("first_step", usual_s) - usual_s),
        start_s=_mean(list(_starts(events))),
        restore_s=_mean(read),
        save_stall_s=max(0.0, _mean(list(_stalls(metrics, events, usual_s)))),
        save_write_s=_mean(saves),
    )
    return Measured(usual_s, costs, len(repairs))


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


def _starts(events: Sequence[Record]) -> Iterator[float]:
    """Seconds from each loss of a worker to the start of one in its stead, in order."""
    formed = next((i for i, line in enumerate(events) if line["event"] == "world_formed"), len(events))
    lost: list[float] = []
    for line in events[formed:]:
        if line["event"] == "worker_lost":
            lost.append(line["time"])
        elif line["event"] == "worker_started" and lost:
            yield max(0.0, line["time"] - lost.pop(0))


def _stalls(metrics: Sequence[Record], events: Sequence[Record], usual_s: float) -> Iterator[float]:
    """By how much the step after each checkpoint's was longer than usual."""
    saved = {(line["generation"], line["checkpoint"]) for line in events if line["event"] == "checkpoint_started"}
    for line in _later_steps(metrics):
        if (line["generation"], line["step"] - 1) in saved:
            yield line["step_s"] - usual_s


def _mean(values: Sequence[float]) -> float:
    return fmean(values) if values else 0.0
