"""What is told of an error at the engine's borders: it may be of the user's code, whose words may hold secrets."""

import sys
import traceback
from collections.abc import Callable

Clean = Callable[[str], str]
"""Job.clean."""


def first_line(text: str, clean: Clean) -> str:
    """Of what an error says; "" if it says nothing."""
    lines = clean(text).splitlines()
    return lines[0] if lines else ""


def print_traceback(clean: Clean) -> None:
    """Of the error that is being handled, to standard error, the worker's log."""
    print(clean(traceback.format_exc()), end="", file=sys.stderr, flush=True)
