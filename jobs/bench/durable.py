"""What durability costs: a checkpoint's hold on the training, its writing, its memory; and sharding the optimizer."""

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from statistics import median

from bench.lab import Lab, beside, ratios
from bench.rows import CLOSE, FAR, Bound, Found, Result, interval_text, results
from bench.s3 import Store, s3_server
from bench.saved import (
    FLOOR,
    MEMORY,
    PLAIN,
    WRITES,
    cpu_ratio,
    extra_memory,
    floor_s,
    late_s,
    peaks,
    slowdown,
    stall_ratio,
    stall_s,
    writes,
)
from bench.sides import JOBS, Side, execute, raytrain, static, torchrun
from bench.work import Steps, Work

OURS = "engine alone"


@dataclass(frozen=True, slots=True)
class Size:
    """What is trained and saved. By default a decoder of 101 million parameters, which are 1.2 GB with AdamW's moments,
    on a batch as small as can be: the steps are short beside what is written.

    Attributes:
        model: keys of section `model`.
        steps: of a run; `save_every` of them between two checkpoints.
        upload_every: instead of `save_every` where they go to S3: nothing is removed there, and the server has 4 GiB.
        about_s: how long a run takes, roughly.
    """

    model: Mapping[str, object] = field(
        default_factory=lambda: {"d_model": 768, "layers": 16, "heads": 12, "kv_heads": 4, "seq_len": 32}
    )
    batch: tuple[int, int] = (2, 1)
    steps: int = 34
    save_every: int = 8
    upload_every: int = 20
    about_s: float = 70.0

    def work(self, workers: int) -> Work:
        return Work(self.steps, data=workers, model=self.model, batch=self.batch, save_every=self.save_every)


LARGE = Size()


def checkpoint(lab: Lab, pairs: int | None, size: Size = LARGE) -> Result:
    """What a checkpoint costs the training on 2 workers and on one, and how quickly it is written when nothing runs."""
    found = (
        *_stalls(lab, pairs or FAR, size),
        _uploading(lab, pairs or CLOSE, size),
        _write(lab, pairs or CLOSE, size, LOCAL, _on_disk),
        _write(lab, pairs or CLOSE, size, S3, _on_s3),
    )
    return results("checkpoint", found)


def memory(lab: Lab, pairs: int | None, size: Size = LARGE, zero1: Work | None = None) -> Result:
    """What checkpoints take of a worker's memory; and ZeRO-1 against torch's, on the work of `throughput`."""
    return results("memory", (_extra_memory(lab, pairs or FAR, size), _zero1(lab, pairs or CLOSE, zero1)))


# ------------------------------------------------------------ while training


STALL = Bound(
    "stall_ratio", "ratio", 1.2, 1.05, "<=", FAR, "2 workers: training held up by a checkpoint / one memory copy"
)
CPU = Bound(
    "cpu_ratio", "ratio", 1.3, 1.15, "<=", FAR, "2 busy cores: CPU time, a checkpoint / writing its bytes plainly"
)


def _stalls(lab: Lab, count: int, size: Size) -> tuple[Found, Found]:
    work = size.work(2)
    ours = static(work, OURS, (FLOOR, PLAIN))
    peers = (
        torchrun("DCP async_save", "save_ddp.py", work, "dcp"),
        torchrun("torch.save", "save_ddp.py", work, "torch"),
        raytrain(work, "Ray Train report", "save_raytrain.py"),
    )
    rounds = lab.rounds([_lasting(side, size) for side in (ours, *peers)], count, _check_saved)
    mine = [r[OURS] for r in rounds if OURS in r]
    lines = [interval_text(list(map(stall_ratio, mine)))]
    if mine:
        text = f"{OURS}: {_ms(stall_s, mine)}; one memory copy: {_ms(floor_s, mine)}"
        late = [late for r in mine if (late := late_s(r)) is not None]
        lines.append(f"{text}; the step after it comes {_median_ms(late)} later than others" if late else text)
    lines += [f"{p.name}: {_ms(stall_s, runs)}" for p in peers if (runs := [r[p.name] for r in rounds if p.name in r])]
    failures = lab.reasons([OURS, *(p.name for p in peers)])
    return (
        Found(STALL, list(map(stall_ratio, mine)), count, lines + failures),
        Found(CPU, list(map(cpu_ratio, mine)), count, lab.reasons([OURS])),
    )


def _check_saved(side: Side, steps: Steps) -> None:
    """Raises BenchError for a run in which not all was measured that is asked for."""
    if side.name == OURS:
        stall_ratio(steps)
        cpu_ratio(steps)
    else:
        stall_s(steps)


UPLOADING = Bound(
    "step_while_uploading", "ratio", 1.05, 1.02, "<=", CLOSE, "1 worker: step time, while its part goes to S3 / else"
)


def uploader(work: Work, name: str) -> Side:
    """The engine alone, with its run directory on an S3 server that begins and ends with the run."""

    def run(folder: Path) -> Steps:
        with _on_s3(folder) as store:
            return static(replace(work, storage=store.url), name, (WRITES,), store.environment).run(folder)

    return Side(name, 40, run)


def _uploading(lab: Lab, count: int, size: Size) -> Found:
    side = uploader(replace(size.work(1), save_every=size.upload_every), "engine alone, 1 worker")
    rounds = lab.rounds([_lasting(side, size)], count, _check_uploading)
    values = [slowdown(r[side.name]) for r in rounds if side.name in r]
    lines = [beside(rounds, [side.name]), interval_text(values), *lab.reasons([side.name])]
    return Found(UPLOADING, values, count, lines)


def _check_uploading(_: Side, steps: Steps) -> None:
    slowdown(steps)


# ------------------------------------------------------------ training paused


LOCAL = Bound("local_write", "ratio", 0.9, 1.0, ">=", CLOSE, "bytes/s, a checkpoint / one sequential write")
S3 = Bound("s3_write", "ratio", 0.9, 1.0, ">=", CLOSE, "bytes/s, a checkpoint / one s3fs upload")
Place = Callable[[Path], AbstractContextManager[Store]]


@dataclass(frozen=True, slots=True)
class Written:
    """One pair: seconds, and CPU seconds, of writing the bytes as ours are written and plainly."""

    store: str
    bytes: int
    ours_s: float
    plain_s: float
    ours_cpu_s: float
    plain_cpu_s: float

    def __str__(self) -> str:
        return f"ours {self.ours_s:.2f} s, plain {self.plain_s:.2f} s"


def _on_disk(folder: Path) -> AbstractContextManager[Store]:
    return nullcontext(Store("disk", str(folder / "store"), {}))


def _on_s3(folder: Path) -> AbstractContextManager[Store]:
    (folder / "server").mkdir()
    return s3_server(folder / "server")


def _write(lab: Lab, count: int, size: Size, bound: Bound, place: Place) -> Found:
    pairs = lab.repeat(bound.name, count, partial(write_pair, size.work(2), place))
    values = [pair.plain_s / pair.ours_s for pair in pairs]
    lines = [interval_text(values), *lab.reasons([bound.name])]
    if pairs:
        for name in ("ours", "plain"):
            rate = median(pair.bytes / getattr(pair, f"{name}_s") for pair in pairs) / 1e6
            cpu = median(getattr(pair, f"{name}_cpu_s") for pair in pairs)
            lines.append(f"{name}: {rate:.0f} MB/s to {pairs[-1].store}, CPU {cpu:.2f} s")
    return Found(bound, values, count, lines)


def write_pair(work: Work, place: Place, folder: Path, number: int) -> Written:
    """Both once, each in a process of its own; in rounds of odd numbers plainly first.

    Raises:
        BenchError: if it fails, or there is no such place.
    """
    found: dict[str, dict[str, float]] = {}
    with place(folder) as store:
        script, work_file = str(JOBS / "bench" / "writing.py"), str(work.write(folder))
        for name in ("ours", "plain") if number % 2 == 0 else ("plain", "ours"):
            out = folder / f"{name}.json"
            execute([sys.executable, script, work_file, store.url, str(out), name], folder, store.environment)
            found[name] = json.loads(out.read_text())
    ours, plain = found["ours"], found["plain"]
    return Written(store.name, int(ours["bytes"]), ours["s"], plain["s"], ours["cpu_s"], plain["cpu_s"])


# ------------------------------------------------------------ memory


EXTRA = Bound(
    "extra_host_memory", "ratio", 1.05, 1.01, "<=", FAR, "peak memory that checkpoints add to a worker / its part"
)
ZERO1 = Bound(
    "zero1_step", "ratio", 1.0, 1.05, ">=", CLOSE, "tokens/s, engine, copies 1 / DDP + ZeroRedundancyOptimizer"
)

SAVING = "with checkpoints"


def _extra_memory(lab: Lab, count: int, size: Size) -> Found:
    work = size.work(2)
    saving = static(work, SAVING, (MEMORY, WRITES))
    without = static(replace(work, save_every=0), "without", (MEMORY,))
    rounds = lab.rounds([_lasting(side, size) for side in (saving, without)], count, _check_memory)
    values = [extra_memory(r[SAVING], r[without.name]) for r in rounds if SAVING in r and without.name in r]
    return Found(EXTRA, values, count, lab.reasons([SAVING, without.name]))


def _zero1(lab: Lab, count: int, work: Work | None) -> Found:
    work = work or Work(steps=40, data=2, copies=1)
    ours, peer = static(work), torchrun("DDP + ZeroRedundancyOptimizer", "train_zero1.py", work)
    rounds = lab.rounds((ours, peer), count)
    values = ratios(rounds, peer.name, ours.name, lambda s: s.step_s)
    names = (ours.name, peer.name)
    return Found(ZERO1, values, count, [beside(rounds, names), interval_text(values), *lab.reasons(names)])


def _check_memory(side: Side, steps: Steps) -> None:
    peaks(steps)
    if side.name == SAVING:
        writes(steps)


# ------------------------------------------------------------ parts


def _lasting(side: Side, size: Size) -> Side:
    return replace(side, about_s=size.about_s)


def _ms(value: Callable[[Steps], float], runs: Sequence[Steps]) -> str:
    return _median_ms([value(run) for run in runs])


def _median_ms(seconds: Sequence[float]) -> str:
    return f"{1000 * median(seconds):.0f} ms"
