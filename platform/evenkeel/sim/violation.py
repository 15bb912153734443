"""How a check says that something does not hold."""


class ViolationError(AssertionError):
    """An invariant does not hold."""


def require(holds: bool, what: str) -> None:
    if not holds:
        raise ViolationError(what)
