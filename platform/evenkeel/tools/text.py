"""Tables, sizes and times, for people: rich on a terminal, aligned text in a log or a pipe."""

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from rich.table import Table

UNITS = ("B", "kB", "MB", "GB", "TB", "PB")


class Advance(Protocol):
    """Told of so many more bytes."""

    def __call__(self, done: int, /) -> None: ...


def size_text(size: float) -> str:
    """Bytes in the decimal unit that leaves one to three digits before the point: "12.3 MB"."""
    for unit in UNITS[:-1]:
        if size < 999.5:
            return f"{size:.0f} B" if unit == "B" else f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} {UNITS[-1]}"


def time_text(time: float | None) -> str:
    """Unix seconds in local time; "-" for None."""
    return "-" if time is None else datetime.fromtimestamp(time).strftime("%Y-%m-%d %H:%M:%S")


def print_table(head: Sequence[str], rows: Sequence[Sequence[str]], right: Sequence[str] = ()) -> None:
    """To stdout. Columns whose heads are in `right` are aligned there."""
    console = Console(highlight=False)
    if not console.is_terminal:
        print("\n".join(aligned(head, rows, right)))
        return
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in head:
        table.add_column(name, justify="right" if name in right else "left", overflow="fold")
    for row in rows:
        table.add_row(*row)
    console.print(table, markup=False)


def aligned(head: Sequence[str], rows: Sequence[Sequence[str]], right: Sequence[str] = ()) -> list[str]:
    """Lines of columns, two spaces apart."""
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    lines = []
    for row in (head, *rows):
        cells = zip(row, widths, head, strict=True)
        lines.append("  ".join(c.rjust(w) if name in right else c.ljust(w) for c, w, name in cells).rstrip())
    return lines


@contextmanager
def progress(what: str, total: int) -> Iterator[Advance]:
    """A bar of bytes on stderr if that is a terminal; it goes away at the end. Else nothing is shown."""
    console = Console(file=sys.stderr)
    if not console.is_terminal:
        yield lambda done, /: None
        return
    name, rate, rest = TextColumn("{task.description}"), TransferSpeedColumn(), TimeRemainingColumn()
    with Progress(name, BarColumn(), DownloadColumn(), rate, rest, console=console, transient=True) as bar:
        task = bar.add_task(what, total=total)
        yield lambda done, /: bar.advance(task, done)
