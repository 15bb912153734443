"""What came out of `evenkeel simulate`, drawn by matplotlib: the extra `plot`, imported when it is asked for."""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

from evenkeel.sim.goodput.setting import CAUSES
from evenkeel.sim.goodput.study import Estimate, Point
from evenkeel.tools.goodput_text import NAMES, Result, headline, value_text
from evenkeel.tools.virtual_run import bad

SUFFIXES = (".png", ".svg")
UNITS = {"spares": "nodes", "copies": "of the optimizer state", "mirror_every": "steps", "interval": "steps"}
LOST = CAUSES[1:]
COLOURS = dict(zip(LOST, ("#8da0cb", "#fc8d62", "#e78ac3", "#d53e4f", "#66c2a5", "#4d4d4d", "#bdbdbd"), strict=True))


def check(path: Path) -> None:
    """Raises ConfigError if this could not be drawn, before anything is simulated."""
    if path.suffix not in SUFFIXES:
        raise bad("--plot", f"{str(path)!r}: expected a name that ends in .png or .svg")
    if not path.parent.is_dir():
        raise bad("--plot", f"{path}: there is no folder {path.parent}")
    if find_spec("matplotlib") is None:
        raise bad("--plot", "needs matplotlib, which is not installed; it comes with: pip install 'evenkeel[plot]'")


def draw(result: Result, path: Path) -> None:
    """The goodput with its intervals, and below it where the rest of the time went."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context({"font.size": 11, "axes.spines.top": False, "axes.spines.right": False, "svg.fonttype": "none"}):
        figure = Figure(figsize=(8.5, 7.0), layout="constrained", dpi=150)
        above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
        figure.suptitle(headline(result), fontsize=10)
        _goodput(result, above)
        _lost(result, below)
        figure.savefig(path, format=path.suffix[1:])


def _goodput(result: Result, axes: Any) -> None:
    """A line for each value of what else is varied, over the last axis."""
    lines: dict[str, list[tuple[int, Point]]] = {}
    for place, point in enumerate(result.points):
        others = ", ".join(f"{NAMES[name]} {value_text(name, point.varied[name])}" for name in result.axes[:-1])
        lines.setdefault(others, []).append((place, point))
    for name, found in lines.items():
        values = [point.goodput for _, point in found]
        bars = [[_below(v) for v in values], [_above(v) for v in values]]
        places = [place for place, _ in found]
        label = name or ("goodput, 95 % interval" if result.seeds > 1 else "goodput")
        axes.errorbar(places, [100 * v.mean for v in values], yerr=bars, fmt="o-", capsize=5, label=label)
    axes.set_ylabel("goodput [% of time]")
    axes.grid(axis="y", alpha=0.3)
    axes.legend(frameon=False)


def _lost(result: Result, axes: Any) -> None:
    bottom = [0.0] * len(result.points)
    for cause in LOST:
        shares = [100 * point.shares[cause] for point in result.points]
        if max(shares) > 0:
            axes.bar(range(len(shares)), shares, bottom=bottom, width=0.6, label=cause, color=COLOURS[cause])
            bottom = [low + share for low, share in zip(bottom, shares, strict=True)]
    axes.set_ylabel("lost [% of time]")
    axes.set_xticks(range(len(result.points)), [_tick(result, point) for point in result.points])
    axes.set_xlabel("; ".join(f"{NAMES[name]} [{UNITS[name]}]" for name in reversed(result.axes)))
    axes.grid(axis="y", alpha=0.3)
    axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5), reverse=True)


def _tick(result: Result, point: Point) -> str:
    return "\n".join(value_text(name, point.varied[name]) for name in reversed(result.axes))


def _below(value: Estimate) -> float:
    return 0.0 if value.low is None else 100 * (value.mean - value.low)


def _above(value: Estimate) -> float:
    return 0.0 if value.high is None else 100 * (value.high - value.mean)
