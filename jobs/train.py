"""Trains as configured: python jobs/train.py --config conf/local.yaml [--config more.yaml] [key=value ...]"""

import argparse
import sys
from pathlib import Path

try:
    import evenkeel
except ModuleNotFoundError:  # not installed: it lies beside this folder
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "platform"))
    import evenkeel

from evenkeel.config import ConfigError, load_config, to_yaml
from evenkeel.trainer import BAD_INPUT, run


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="train.py", description="Trains one model on a changing set of workers.")
    parser.add_argument("--config", action="append", default=[], metavar="FILE", help="YAML; later files win")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="wins over every file")
    parser.add_argument("--print-config", action="store_true", help="print the resolved configuration and exit")
    parser.add_argument("--dry-run", action="store_true", help="check everything and print the plan, start nothing")
    parser.add_argument("--version", action="version", version=f"evenkeel {evenkeel.__version__}")
    return parser.parse_intermixed_args(arguments)


def main(arguments: list[str]) -> int:
    """Returns the exit status."""
    options = parse(arguments)
    sys.path.append(str(Path.cwd()))  # where a user's own "module:function" lies
    try:
        config = load_config(options.config, options.overrides)
    except ConfigError as error:
        print(f"evenkeel: {error}", file=sys.stderr)
        return BAD_INPUT
    if options.print_config:
        print(to_yaml(config), end="")
        return 0
    return run(config, dry_run=options.dry_run)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
