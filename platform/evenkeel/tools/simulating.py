"""`evenkeel simulate`: how many spares, copies, which interval; asked of the real controller in virtual time."""

import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from multiprocessing import Pool
from pathlib import Path

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from evenkeel.sim.goodput.costs import Costs
from evenkeel.sim.goodput.setting import Outcome, Setting
from evenkeel.sim.goodput.study import study
from evenkeel.tools import goodput_plot, goodput_text, virtual_run
from evenkeel.tools import simulate_options as o
from evenkeel.tools.measured import Measured, measured_in
from evenkeel.tools.virtual_run import Trained, bad

SEEDS = 5


def simulate(
    cluster: o.Cluster = None,
    config: o.Config = None,
    params: o.Params = None,
    layers: o.Layers = None,
    pipeline: o.Pipeline = None,
    tensor: o.Tensor = None,
    micro_batches: o.MicroBatches = None,
    step_seconds: o.StepSeconds = None,
    tokens: o.Tokens = None,
    min_nodes: o.MinNodes = None,
    rate: o.Rate = 0.0065,
    repair_hours: o.RepairHours = 24.0,
    rack: o.Rack = 1,
    rack_share: o.RackShare = 0.0,
    trace: o.TraceFile = None,
    run: o.Measured = None,
    given: o.Given = None,
    price: o.Price = 0.0,
    spares: o.Spares = "0",
    copies: o.Copies = None,
    mirror_every: o.MirrorEvery = None,
    interval: o.Interval = None,
    days: o.Days = None,
    seeds: o.Seeds = None,
    per_worker: o.PerWorker = False,
    processes: o.Processes = None,
    plot: o.Plot = None,
    as_json: o.AsJson = False,
) -> None:
    """Says what a run makes of its time on a cluster that fails, and what spares, copies and checkpoints change."""
    if plot is not None:
        goodput_plot.check(plot)
    if trace is not None and (seeds or 1) > 1:
        raise bad("--seeds", f"is {seeds}, but a trace is the same for every seed; leave it out")
    failing = virtual_run.failures(rate, repair_hours, rack, rack_share, trace)
    said = _trained(config, params, layers).with_said(pipeline, tensor, micro_batches, tokens)
    axes = _axes(said, spares, copies, mirror_every, interval)
    found = None if run is None else _measured(run)
    base = virtual_run.base(
        said,
        virtual_run.cluster(cluster, said),
        failing,
        virtual_run.costs_with(found.costs if found else Costs(), given or ()),
        step_s=found.step_s if found and step_seconds is None else step_seconds,
        duration_s=virtual_run.duration(days, failing),
        min_nodes=min_nodes,
        per_node=not per_worker,
        price=price,
    )
    result = _run(base, axes, seeds or (1 if trace else SEEDS), processes)
    if plot is not None:
        goodput_plot.draw(result, plot)
    if as_json:
        typer.echo(json.dumps(goodput_text.record(result)))
        return
    goodput_text.show(result)
    if plot is not None:
        typer.echo(f"drawn in {plot}")


def _measured(run: str) -> Measured:
    found = measured_in(run)
    if not found.repairs:
        typer.echo(
            f"evenkeel: {run}: no repair was measured there; what is not given by --cost takes no time", err=True
        )
    return found


def _trained(config: Sequence[Path] | None, params: float | None, layers: int | None) -> Trained:
    if config:
        if params is not None or layers is not None:
            raise bad("--params", "says what --config says too; leave one of them out")
        sys.path.append(str(Path.cwd()))  # where a user's own "module:function" lies
        return virtual_run.of_config(config)
    if params is None or layers is None:
        raise bad("--params", "and --layers say what is trained, such as --params 70e9 --layers 80; or give --config")
    return virtual_run.of_size(params, layers)


def _axes(
    trained: Trained, spares: str, copies: str | None, mirror_every: str | None, interval: str | None
) -> dict[str, tuple[int | None, ...]]:
    """What is tried of each; where nothing is said, what the configuration says."""
    numbers, known = virtual_run.numbers, virtual_run.AXES
    return {
        "spares": numbers(known["spares"], spares),
        "copies": (trained.copies,) if copies is None else numbers(known["copies"], copies, "all"),
        "mirror_every": (trained.mirror_every,)
        if mirror_every is None
        else numbers(known["mirror_every"], mirror_every),
        "interval": (trained.interval,) if interval is None else numbers(known["interval"], interval, "none"),
    }


def _run(
    base: Setting, axes: Mapping[str, Sequence[int | None]], seeds: int, processes: int | None
) -> goodput_text.Result:
    """Simulates all of it, with a bar on a terminal."""
    settings = virtual_run.settings(base, axes)
    spent: list[float] = []

    def simulate(every: Sequence[Setting]) -> Iterator[Outcome]:
        at_once = min(len(every), processes or len(os.sched_getaffinity(0)))
        with _bar(len(every)) as tell:
            for outcome, cpu_s in _one_by_one(every, tell) if at_once == 1 else _at_once(every, at_once):
                spent.append(cpu_s)
                tell(len(spent))
                yield outcome

    points = study(settings, range(seeds), simulate)
    cpu_s = tuple(sum(spent[i * seeds : (i + 1) * seeds]) for i in range(len(settings)))
    varied = tuple(name for name in axes if len(axes[name]) > 1)
    return goodput_text.Result(base, seeds, varied, points, cpu_s)


def _one_by_one(settings: Sequence[Setting], tell: Callable[[float], None]) -> Iterator[tuple[Outcome, float]]:
    for done, setting in enumerate(settings):
        yield _simulated(setting, partial(_tell_part, tell, done, setting.duration_s))


def _tell_part(tell: Callable[[float], None], done: int, whole_s: float, now: float) -> None:
    tell(done + now / whole_s)


def _at_once(settings: Sequence[Setting], processes: int) -> Iterator[tuple[Outcome, float]]:
    # Ctrl-C goes to all of them; leaving the pool ends those that are left.
    with Pool(processes, signal.signal, (signal.SIGINT, signal.SIG_IGN)) as pool:
        yield from pool.imap(_simulated, settings)


def _simulated(setting: Setting, progress: Callable[[float], None] = lambda now: None) -> tuple[Outcome, float]:
    """With the CPU seconds that it took."""
    from evenkeel.sim.goodput.run import simulate_one

    began = time.process_time()
    return simulate_one(setting, progress), time.process_time() - began


@contextmanager
def _bar(total: int) -> Iterator[Callable[[float], None]]:
    """A bar on stderr if that is a terminal, which goes away at the end; told how many simulations are done."""
    console = Console(file=sys.stderr)
    if not console.is_terminal:
        yield lambda done: None
        return
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("simulating", total=total)
        yield lambda done: bar.update(task, completed=done)
