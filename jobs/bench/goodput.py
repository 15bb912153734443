"""The goodput simulator: how long a month of 16,384 GPUs takes it, and a trace, and how near it comes to a real run."""

import time
from pathlib import Path

from bench.lab import Lab
from bench.planning import large_model
from bench.predicted import against_real
from bench.process import BenchError
from bench.rows import Bound, Result, complete
from evenkeel.plan.interval import duration
from evenkeel.sim.goodput.costs import Costs
from evenkeel.sim.goodput.outages import DAY_S, Drawn, Repair, read_trace
from evenkeel.sim.goodput.run import simulate_one
from evenkeel.sim.goodput.setting import Outcome, Setting

TRACE = Path(__file__).parent / "traces" / "bamboo-p3.csv"
"""Spot instances of one kind over 11 hours: Thorpe et al., "Bamboo", 2023; LICENSE.bamboo lies beside it."""
TIMED = 3
"""Rounds of what is timed; a prediction takes a quarter of an hour, and is made once."""
COSTS = Costs(
    detect_s=5.0, abort_s=1.0, settle_s=0.5, plan_s=1.0, regroup_s=20.0, reshard_s=5.0, first_step_s=10.0,
    start_s=120.0, restore_s=60.0, save_stall_s=3.0, save_write_s=60.0, reshard_bytes_per_s=5e9,
)  # fmt: skip


def month() -> Setting:
    """16,384 GPUs in 2,048 nodes, 24 of them spares, at 6.5 failures per 1,000 node-days, repaired in a day."""
    return Setting(
        nodes=tuple(f"n{i:04d}" for i in range(2048)), devices_per_node=8, model=large_model(),
        data=253, pipeline=8, tensor=8, micro_batches=2024, step_s=8.0, tokens_per_step=16e6, duration_s=30 * DAY_S,
        failures=Drawn(6.5e-3, Repair(DAY_S)), costs=COSTS, min_workers=64, spares=24,
    )  # fmt: skip


def bamboo() -> Setting:
    """The trace, whose nodes have one device each: 8 pipelines of 4 stages at full strength."""
    trace = read_trace(TRACE)
    return Setting(
        nodes=trace.beginning, devices_per_node=1, model=large_model(), data=8, pipeline=4, tensor=1, micro_batches=64,
        step_s=8.0, tokens_per_step=5e5, duration_s=trace.duration_s, failures=trace, costs=COSTS, min_workers=4,
        mirror_every=5,
    )  # fmt: skip


def simulate(lab: Lab, pairs: int | None) -> Result:
    """Virtual months and hours in CPU seconds of this process, and a real run's time over the predicted one."""
    notes: dict[str, str] = {}

    def timed(name: str, setting: Setting) -> list[float]:
        def run(folder: Path, number: int) -> float:
            began = time.process_time()
            outcome = simulate_one(setting)
            taken = time.process_time() - began
            notes[name] = _words(outcome, taken)
            return taken

        return lab.repeat(name, pairs or TIMED, run)

    def predicted(folder: Path, number: int) -> float:
        found = against_real(folder, number)
        notes["against_real"] = found.words
        return found.apart

    once = pairs or 1
    bounds = (
        Bound("month_16384", "s", 60.0, 20.0, "<=", TIMED, "CPU time: 30 days of 16,384 GPUs in 2,048 nodes"),
        Bound("bamboo_p3", "s", 10.0, 3.0, "<=", TIMED, "CPU time: 11 hours of spot instances, by a trace"),
        Bound(
            "against_real",
            "ratio",
            1.1,
            1.03,
            "<=",
            1,
            "a real run of 20 kills and its prediction, the longer over the shorter",
        ),
    )
    runs = (timed("month_16384", month()), timed("bamboo_p3", bamboo()), lab.repeat("against_real", once, predicted))
    rounds = (pairs or TIMED, pairs or TIMED, once)
    rows = tuple(complete(b, found, count) for b, found, count in zip(bounds, runs, rounds, strict=True))
    return Result("simulate", rows, {**notes, **lab.failures}, {b.name: b.what for b in bounds})


def _words(outcome: Outcome, cpu_s: float) -> str:
    if outcome.ended:
        raise BenchError(f"the simulated run ended by itself: {outcome.ended}")
    speed = f"{outcome.events:,} events, {outcome.events / cpu_s:,.0f} a second"
    goodput = f"goodput {100 * outcome.goodput:.2f} %"
    return f"{speed}\n{goodput}, {outcome.incidents} incidents in {duration(outcome.duration_s)}"
