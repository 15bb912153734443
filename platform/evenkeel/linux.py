"""Where evenkeel runs: on Linux, and it says so rather than failing somewhere inside."""

import sys


class UnsupportedSystemError(RuntimeError):
    """This operating system will not do."""


def require_linux(system: str = sys.platform) -> None:
    """Raises UnsupportedSystemError anywhere else: signals, process groups and socket handling are Linux's."""
    if system != "linux":
        raise UnsupportedSystemError(f"evenkeel runs on Linux only; this is {system}")
