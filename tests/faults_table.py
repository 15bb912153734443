"""Makes docs/faults.md's tables from the JUnit files of `make soak`: python tests/faults_table.py FILE... > TABLES.md

With --write the tables replace those in docs/faults.md, between its two marks.
"""

import argparse
import json
import os
import platform
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

PAGE = Path(__file__).parents[1] / "docs" / "faults.md"
BEGIN, END = "<!-- measured: begin -->", "<!-- measured: end -->"
TITLES = {
    "stages": "Two pipelines of three stages, a spare for every death",
    "tensor": "Two pipelines of one stage, each on a tensor-parallel pair, a spare for every death",
    "bf16": "The same in bf16",
    "shrinking": "Two pipelines of two stages, no spare: the world shrinks, and grows when a new worker comes",
    "spare": "A spare is hit",
    "unequal": "Three workers: a pipeline of two stages beside one of a single stage, a spare for every death",
    "one pipeline": "One pipeline of two stages, each on a tensor-parallel pair",
    "saves": "Checkpoints and loads: two pipelines of one stage",
    "saves, stages": "Checkpoints and loads: two pipelines of two stages",
    "saves, bf16": "Checkpoints and loads: two pipelines of one stage, in bf16",
    "saves, one copy": "Checkpoints and loads: two pipelines of one stage, each holds half of the optimizer's state",
    "saves, other layouts": "Checkpoints and loads: everything dies, and goes on in another layout, in fp64",
    "mirrors": "Mirrors, every second step: one pipeline of two stages, each the only holder of its half",
    "mirrors, one copy": "Mirrors, every second step: two pipelines of one stage, half of the optimizer's state each",
    "mirrors, four stages": "Mirrors, every second step: one pipeline of four stages; 2 keeps the mirror of 1",
    "ray": "Through `jobs/train.py` on Ray, two pipelines of two stages, two spares",
}
GO_BACK = ("saves", "mirrors")
"""How the names of the tables begin in which state is lost on purpose, so that steps are run again."""
KINDS = ("kill", "segv", "exception", "stop")
STEP = ("forward", "backward", "reduce", "before_vote", "after_vote", "commit")
SAVE = ("save", "write", "half", "written", "manifest", "visible", "load")
PHASES = ("while idle", *STEP, "recovery", *SAVE, "mirror", "exchange", "mirrored")
Line = dict[str, Any]


def read(files: Iterable[Path]) -> tuple[list[Line], list[Line]]:
    """Results of cells, and what survivors held, as the tests noted them. What was played again counts once."""
    found: dict[str, dict[tuple[str, ...], Line]] = {"fault": {}, "leak": {}}
    for file in files:
        for item in ElementTree.parse(file).iter("property"):
            if item.get("name") in found:
                line = json.loads(item.get("value", ""))
                key = tuple(line.get(name, "") for name in ("table", "kind", "phase", "target", "who"))
                found[item.get("name", "")][key] = line
    return list(found["fault"].values()), list(found["leak"].values())


def text_of(line: Line | None) -> str:
    if line is None:
        return "–"
    if line["problem"]:
        return f"**no**: {line['problem'].splitlines()[0][:60]}"
    if line["target"] == "both holders" and not line["heal_s"]:
        return "named"
    if line["phase"] == "while idle":
        return "ok"
    return f"ok {line['heal_s'] * 1000:.0f}"


def table(lines: list[Line]) -> str:
    targets = list(dict.fromkeys(line["target"] for line in lines))
    targets = [t for t in targets if t != "both holders"] + [t for t in targets if t == "both holders"]
    cells = {(line["kind"], line["phase"], line["target"]): line for line in lines}
    rows = [
        (kind, phase) for kind in KINDS for phase in PHASES if any((kind, phase, target) in cells for target in targets)
    ]
    text = [f"| kind | phase | {' | '.join(targets)} |", "|---|---|" + "---|" * len(targets)]
    for kind, phase in rows:
        found = [text_of(cells.get((kind, phase, target))) for target in targets]
        text.append(f"| {kind} | {phase} | {' | '.join(found)} |")
    return "\n".join(text)


def leaks(lines: list[Line]) -> str:
    text = ["| | before the first kill | after 10 | after all |", "|---|---|---|---|"]
    text += [f"| {line['who']} | {line['before']} | {line['settled']} | {line['after']} |" for line in lines]
    return "\n".join(text)


def again(faults: list[Line]) -> str:
    """How many steps; apart for the tables in which state is lost on purpose."""
    kept, lost = [], []
    for line in faults:
        (lost if line["table"].startswith(GO_BACK) else kept).append(line["redone"])
    what = "in which somebody alive has every slice, or the run ends"
    texts = [f"{sum(kept)} in {len(kept)} cells {what}"] if kept else []
    if lost:
        cells = f"{sum(map(bool, lost))} of the {len(lost)} of checkpoints, loads and mirrors"
        texts.append(f"{sum(lost)} in {cells}, where nobody alive had all of the newest state")
    return "; ".join(texts)


def report(faults: list[Line], leak: list[Line], when: float) -> str:
    tables: dict[str, list[Line]] = defaultdict(list)
    for line in faults:
        tables[line["table"]].append(line)
    held = sum(not line["problem"] for line in faults)
    date = time.strftime("%Y-%m-%d", time.gmtime(when))
    parts = [
        f"Measured on {date}, {os.cpu_count()} cores, {platform.system()}, Python {platform.python_version()}. "
        f"{held} of {len(faults)} cells held. Committed steps that were run again: {again(faults)}."
    ]
    parts += [f"### {title}\n\n{table(tables[name])}" for name, title in TITLES.items() if tables[name]]
    if leak:
        parts.append(f"### One run through {leak[0]['kills']} kills\n\n{leaks(leak)}")
    return "\n\n".join(parts)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--write", action="store_true", help=f"into {PAGE.name}")
    options = parser.parse_args()
    faults, leak = read(options.files)
    text = report(faults, leak, max(file.stat().st_mtime for file in options.files))
    if not options.write:
        print(text)
        return 0
    if not faults:
        print("no cell was played: the page is left as it is", file=sys.stderr)
        return 1
    before, _, rest = PAGE.read_text().partition(BEGIN)
    PAGE.write_text(f"{before}{BEGIN}\n{text}\n{END}{rest.partition(END)[2]}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
