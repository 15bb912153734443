"""What can go wrong with a store."""


class StoreError(RuntimeError):
    """The store cannot do what is asked; one line that names the path and the cause.

    Attributes:
        file: of a checkpoint that was read, by its name in the folder; "" where it is not about one.
        passes, full: what `transient` and `full` of failures.py said of a cause that is not kept, as it shows a secret.
    """

    file = ""
    passes = False
    full = False


class JournalFenced(StoreError):  # noqa: N818 - it says who one is now, not what went wrong
    """Somebody else wrote the next journal entry: another controller runs this run, so this one must end."""
