"""Runs of bench/static.py in this process: its workers fork from a server that has imported torch already."""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "jobs"))

from bench import static
from bench.work import Steps, Work


def train(work: Work, folder: Path, *words: str) -> Steps:
    """Trains the work as the command does that the benchmarks start, with these words more."""
    folder.mkdir()
    output = folder / "steps.jsonl"
    static.main([str(work.write(folder)), str(output), *words])
    lines = [json.loads(line) for line in output.read_text().splitlines()]
    return Steps(0.0, {line["step"]: line["time"] for line in lines}, {line["step"]: line["loss"] for line in lines})
