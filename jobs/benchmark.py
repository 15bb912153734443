"""Measures evenkeel against its peers: python jobs/benchmark.py NAME [--json] [--pairs N]"""

import argparse
import json
import shutil
import signal
import sys
from importlib.util import find_spec
from pathlib import Path

if find_spec("evenkeel") is None:  # not installed: it lies beside this folder
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "platform"))

from rich.console import Console

from bench.benchmarks import BENCHMARKS
from bench.lab import Lab, say
from bench.table import show

UNKNOWN = 2
STOPPED = 143


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="benchmark.py", description="Measures evenkeel against its peers.")
    parser.add_argument("name", metavar="NAME", help=", ".join(BENCHMARKS))
    parser.add_argument("--json", action="store_true", help="the last line is the result as one JSON object")
    help_pairs = "rounds, instead of 15 where a ratio near 1 is decided and 5 elsewhere; with fewer nothing holds"
    parser.add_argument("--pairs", type=_positive, metavar="N", help=help_pairs)
    return parser.parse_args(arguments)


def _positive(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 1 on")
    return int(text)


def main(arguments: list[str]) -> int:
    """Returns the exit status: 0 if it ran, whatever it found."""
    options = parse(arguments)
    if options.name not in BENCHMARKS:
        print(f"benchmark.py: {options.name!r} is not known; expected one of {', '.join(BENCHMARKS)}", file=sys.stderr)
        return UNKNOWN
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(STOPPED))  # so that what was started is ended
    lab = Lab()
    try:
        result = BENCHMARKS[options.name](lab, options.pairs)
    finally:
        if lab.failures:
            say(f"what was left of the runs is in {lab.folder}")
        else:
            shutil.rmtree(lab.folder, ignore_errors=True)
    show(result, Console(width=None if sys.stdout.isatty() else 160))
    if options.json:
        print(json.dumps(result.to_json()), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
