"""Trains as configured: python jobs/train.py --config conf/local.yaml [--config more.yaml] [key=value ...]"""

import argparse
import sys
from pathlib import Path

try:
    import evenkeel
except ModuleNotFoundError:  # not installed: it lies beside this folder
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "platform"))
    import evenkeel

from evenkeel.runtime.signals import exit_on_request

HERE = Path(__file__).resolve().parent


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="train.py", description="Trains one model on a changing set of workers.")
    parser.add_argument("--config", action="append", default=[], metavar="FILE", help="YAML; later files win")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="wins over every file")
    parser.add_argument("--print-config", action="store_true", help="print the resolved configuration and exit")
    parser.add_argument("--dry-run", action="store_true", help="check what leaves no trace, print the plan and exit")
    help_resume = (
        "where there is a run of this name: go on from its newest checkpoint (auto), begin anew as it did at first, "
        "from what was imported or else from the seed (never), or go on from a step"
    )
    parser.add_argument("--resume", type=_resume, default="auto", metavar="auto|never|STEP", help=help_resume)
    parser.add_argument("--version", action="version", version=f"evenkeel {evenkeel.__version__}")
    return parser.parse_intermixed_args(arguments)


def _resume(text: str) -> str:
    if text not in ("auto", "never") and not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is neither auto nor never nor the step of a checkpoint")
    return text


def main(arguments: list[str]) -> int:
    """Returns the exit status."""
    exit_on_request()
    # These take a second or two, in which a request to stop is to be met, too.
    from evenkeel.config import ConfigError, load_config, to_yaml
    from evenkeel.trainer import BAD_INPUT, run

    options = parse(arguments)
    # A user's own "module:function" lies in the working directory, like for the workers, and not beside this file.
    sys.path[:] = [str(Path.cwd()), *(path for path in sys.path if Path(path).resolve() != HERE)]
    try:
        config = load_config(options.config, options.overrides)
    except ConfigError as error:
        print(f"evenkeel: {error}", file=sys.stderr)
        return BAD_INPUT
    if options.print_config:
        print(to_yaml(config), end="")
        return 0
    return run(config, dry_run=options.dry_run, resume=options.resume)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
