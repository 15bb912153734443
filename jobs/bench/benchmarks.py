"""The benchmarks by name: who runs against whom on what work, and what must come of it."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from statistics import median

from bench import durable, goodput, planning
from bench.lab import Lab, Round, beside, ratios
from bench.process import BenchError
from bench.recovery import CASES, Healed, checks, healed
from bench.rows import CLOSE, FAR, Bound, Result, complete, interval_text, row
from bench.sides import product, raytrain, static, torchrun
from bench.unequal import unequal
from bench.work import Work
from evenkeel.plan.plans import Plan
from evenkeel.plan.workload import Workload

Benchmark = Callable[[Lab, int | None], Result]


def throughput(lab: Lab, pairs: int | None) -> Result:
    """Data parallel over 2 workers: all of evenkeel against torchrun with DDP, and against Ray Train."""
    work = Work(steps=40, data=2)
    ours, ddp, ray = product(work), torchrun("torchrun + DDP", "train_ddp.py", work), raytrain(work)
    rounds = lab.rounds((ours, ddp, ray), pairs or CLOSE)
    return _speed(
        "throughput",
        lab,
        rounds,
        ours.name,
        {
            ddp.name: Bound("vs_ddp", "ratio", 1.0, 1.05, ">=", CLOSE, "tokens/s, evenkeel / torchrun + DDP"),
            ray.name: Bound("vs_raytrain", "ratio", 1.0, 1.05, ">=", CLOSE, "tokens/s, evenkeel / Ray Train"),
        },
    )


def tensor(lab: Lab, pairs: int | None) -> Result:
    """TP 2: our engine against parallelize_module."""
    work = Work(steps=30, tensor=2)
    ours, peer = static(work), torchrun("DTensor", "train_dtensor.py", work)
    bound = Bound("vs_dtensor", "ratio", 1.3, 2.0, ">=", FAR, "tokens/s, engine / parallelize_module")
    return _speed("tensor", lab, lab.rounds((ours, peer), pairs or FAR), ours.name, {peer.name: bound})


def pipeline(lab: Lab, pairs: int | None) -> Result:
    """PP 2, 8 micro-batches, 1F1B: our engine against torch.distributed.pipelining."""
    work = Work(steps=40, pipeline=2)
    ours, peer = static(work), torchrun("torch pipelining", "train_pipelining.py", work)
    bound = Bound("vs_torch", "ratio", 1.0, 1.1, ">=", CLOSE, "tokens/s, engine / torch.distributed.pipelining")
    return _speed("pipeline", lab, lab.rounds((ours, peer), pairs or CLOSE), ours.name, {peer.name: bound})


def overhead(lab: Lab, pairs: int | None) -> Result:
    """Data parallel over 2 workers without faults: all of evenkeel against its own engine alone."""
    work = Work(steps=40, data=2)
    ours, alone = product(work), static(work)
    rounds = lab.rounds((ours, alone), pairs or CLOSE)
    bound = Bound("fault_tolerance", "ratio", 1.01, 1.0, "<=", CLOSE, "step time, evenkeel / engine alone")
    found = ratios(rounds, ours.name, alone.name, lambda s: s.step_s)
    return _ratio_result("overhead", lab, rounds, ours.name, [(alone.name, bound, found)])


def startup(lab: Lab, pairs: int | None) -> Result:
    """From the command to the first committed step, 2 workers."""
    work = Work(steps=12, data=2)
    ours, ray = product(work), raytrain(work)
    rounds = lab.rounds((ours, ray), pairs or FAR)
    bound = Bound("vs_raytrain", "ratio", 1.0, 0.7, "<=", FAR, "command to first step, evenkeel / Ray Train")
    found = ratios(rounds, ours.name, ray.name, lambda s: s.first_step_s)
    result = _ratio_result("startup", lab, rounds, ours.name, [(ray.name, bound, found)])
    times = "\n".join(
        f"{name}: first step after {median(r[name].first_step_s for r in rounds if name in r):.1f} s"
        for name in (ours.name, ray.name)
        if any(name in r for r in rounds)
    )
    return replace(result, notes={bound.name: "\n".join(filter(None, [times, lab.failures.get(ray.name)]))})


def recovery(lab: Lab, pairs: int | None) -> Result:
    """4 workers as 2 pipelines of 2 stages; for mirrors one pipeline: from the signal to the next committed step."""
    cases = {case.name: case for case in CASES}
    sides = [product(case.work(), case.name) for case in CASES]
    rounds = lab.rounds(sides, pairs or FAR, partial(checks, cases))
    found = {name: [healed(r[name]) for r in rounds if name in r] for name in cases}
    less = "signal to next step, less one step"
    bounds = (
        (Bound("spare", "s", 0.5, 0.15, "<=", FAR, f"SIGKILL, a spare stands by: {less}"), _less_one_step),
        (Bound("shrink", "s", 0.7, 0.2, "<=", FAR, f"SIGKILL, no spare: {less}"), _less_one_step),
        (_hang_bound(found["hang"]), _gap),
        (Bound("mirror", "s", 1.0, 0.5, "<=", FAR, f"SIGKILL, one pipeline, mirrors: {less}"), _less_one_step),
    )
    rows = tuple(complete(bound, [value(h) for h in found[bound.name]], len(rounds)) for bound, value in bounds)
    notes = {b.name: _healing_note(found[b.name], lab.failures.get(b.name)) for b, _ in bounds}
    return Result("recovery", rows, notes, {b.name: b.what for b, _ in bounds})


def plan(lab: Lab, pairs: int | None) -> Result:
    """Planning at scale, pure Python: for equal workers, and for two kinds of device."""
    runs = pairs or FAR
    equal = Bound("equal_4096", "s", 1.0, 0.2, "<=", FAR, "a layout for 4,096 equal workers in 512 nodes")
    what = "cuts and shares by speed, 4,096 workers in 64 pipelines: who is with whom stays"
    again = Bound("replan_4096", "s", 0.2, 0.1, "<=", FAR, what)
    results = [_timed(equal, runs, planning.equal_4096), _timed(again, runs, planning.replan_4096)]
    work = {case.model.name: planning.counted(case.model) for case in planning.MIXED}
    for case in planning.MIXED:
        what = f"{case.devices:,} devices, half H100 and half A100 40 GB: all TP degrees"
        bound = Bound(case.name, "s", case.must_s, case.goal_s, "<=", FAR, what)
        plans: list[Plan] = []
        result = _timed(bound, runs, partial(_planned, case, work[case.model.name], plans))
        results.append(replace(result, notes=result.notes or {bound.name: _plan_note(plans[-1])}))
    rows = tuple(row for result in results for row in result.rows)
    notes = {name: note for result in results for name, note in result.notes.items()}
    return Result("plan", rows, notes, {name: what for result in results for name, what in result.what.items()})


def _timed(bound: Bound, runs: int, seconds: Callable[[], float]) -> Result:
    try:
        return Result("plan", (row(bound, [seconds() for _ in range(runs)]),), {}, {bound.name: bound.what})
    except BenchError as error:
        return Result("plan", (row(bound, []),), {bound.name: str(error)}, {bound.name: bound.what})


def _planned(case: planning.Mixed, work: Workload, plans: list[Plan]) -> float:
    taken, found = planning.mixed(case, work)
    plans.append(found)
    return taken


def _plan_note(found: Plan) -> str:
    best = "no plan that was looked at is better" if found.gap <= 0 else f"at most {found.gap:.2%} above the best"
    return f"TP {found.tensor}, {found.data} pipelines, a step of {found.step_s:.3g} s: {best}"


BENCHMARKS: dict[str, Benchmark] = {
    "throughput": throughput,
    "tensor": tensor,
    "pipeline": pipeline,
    "recovery": recovery,
    "startup": startup,
    "overhead": overhead,
    "plan": plan,
    "checkpoint": durable.checkpoint,
    "memory": durable.memory,
    "unequal": unequal,
    "simulate": goodput.simulate,
}


def _speed(name: str, lab: Lab, rounds: Sequence[Round], ours: str, peers: dict[str, Bound]) -> Result:
    """Rows of tokens per second, ours over theirs: on the same work that is their time per step over ours."""
    found = [(peer, bound, ratios(rounds, peer, ours, lambda s: s.step_s)) for peer, bound in peers.items()]
    return _ratio_result(name, lab, rounds, ours, found)


def _ratio_result(
    name: str, lab: Lab, rounds: Sequence[Round], ours: str, found: Sequence[tuple[str, Bound, list[float]]]
) -> Result:
    rows = tuple(complete(bound, values, len(rounds)) for _, bound, values in found)
    notes = {}
    for peer, bound, values in found:
        lines = [beside(rounds, (ours, peer)), interval_text(values)]
        lines += [f"{who}: {lab.failures[who]}" for who in (ours, peer) if who in lab.failures]
        notes[bound.name] = "\n".join(filter(None, lines))
    return Result(name, rows, notes, {bound.name: bound.what for _, bound, _ in found})


def _hang_bound(found: Sequence[Healed]) -> Bound:
    """3 s and 3 steps at most, 1 s and 2 steps wished for: in seconds by the steps of these very runs."""
    step_s = median(h.step_s for h in found) if found else 0.0
    what = "SIGSTOP: signal to next step; at most 3 s + 3 steps, goal 1 s + 2 steps"
    return Bound("hang", "s", 3 + 3 * step_s, 1 + 2 * step_s, "<=", FAR, what)


def _less_one_step(h: Healed) -> float:
    return h.less_one_step_s


def _gap(h: Healed) -> float:
    return h.gap_s


def _healing_note(found: Sequence[Healed], failure: str | None) -> str:
    lines = [failure] if failure else []
    if found:
        step, gap = median(h.step_s for h in found), median(h.gap_s for h in found)
        lines.append(f"a step takes {1000 * step:.0f} ms, the gap was {1000 * gap:.0f} ms")
    return "\n".join(lines)
