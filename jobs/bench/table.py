"""A benchmark's result for people."""

from rich.console import Console
from rich.table import Table

from bench.rows import Result, Row


def show(result: Result, console: Console) -> None:
    table = Table(title=result.benchmark, show_lines=True)
    for name, style in (("row", "bold"), ("what", ""), ("value", "bold"), ("must", ""), ("goal", ""), ("holds", "")):
        table.add_column(name, style=style, no_wrap=name not in ("what",))
    table.add_column("runs", justify="right")
    table.add_column("beside", overflow="fold")
    for line in result.rows:
        table.add_row(*_cells(line, result))
    console.print(table)
    document = result.to_json()
    for name in ("machine", "versions"):
        values = document[name]
        assert isinstance(values, dict)
        console.print(f"{name}: " + ", ".join(f"{k} {v}" for k, v in values.items()), highlight=False)
    console.print(f"date: {document['date']}", highlight=False)


def _cells(line: Row, result: Result) -> tuple[str, ...]:
    unit = "" if line.unit == "ratio" else f" {line.unit}"
    return (
        line.name,
        result.what.get(line.name, ""),
        "not measured" if line.value is None else f"{line.value:.3f}{unit}",
        f"{line.better} {line.must:.3g}{unit}",
        f"{line.better} {line.goal:.3g}{unit}",
        "yes" if line.holds else "no",
        str(len(line.runs)),
        result.notes.get(line.name, ""),
    )
