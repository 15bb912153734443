"""Files on a store that is waited for when it fails in a way that passes; see retry.py."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from typing import TypeVar

from evenkeel.store.failures import full
from evenkeel.store.files import Files, Sink
from evenkeel.store.retry import Patience, Trouble, Unhurried, retrying

T = TypeVar("T")
PATIENCE = Patience()


class PatientFiles:
    """The same files; each call is repeated while that may help.

    A `stream` is not: what was streamed cannot be had again from here. Repeat what writes it.

    Args:
        report: told before each pause, by the thread that waits.
        wait: returns after so many seconds, or earlier and True to give up.
        patience: with errors that pass.
        room: with a full disk; None not to wait for that.
    """

    def __init__(
        self,
        files: Files,
        report: Callable[[Trouble], None],
        wait: Callable[[float], bool],
        patience: Patience | Unhurried = PATIENCE,
        room: Patience | None = None,
    ) -> None:
        self._files, self._report, self._wait = files, report, wait
        self._patience, self._room = patience, room

    def repeat(self, call: Callable[[], T]) -> T:
        """As any other call here."""
        if self._room is not None:
            call = partial(retrying, call, self._report, self._wait, self._room, passes=full)
        return retrying(call, self._report, self._wait, self._patience)

    def where(self, name: str = "") -> str:
        return self._files.where(name)

    def read(self, name: str, offset: int = 0) -> bytes | None:
        return self.repeat(partial(self._files.read, name, offset))

    def read_into(self, name: str, offset: int, buffer: memoryview) -> int | None:
        return self.repeat(partial(self._files.read_into, name, offset, buffer))

    def replace(self, name: str, data: bytes) -> None:
        self.repeat(partial(self._files.replace, name, data))

    def create(self, name: str, data: bytes) -> bool:
        return self.repeat(partial(self._files.create, name, data))

    def replace_if(self, name: str, data: bytes, gives_way: Callable[[], bool]) -> bool:
        return self.repeat(partial(self._files.replace_if, name, data, gives_way))

    def remove(self, name: str) -> None:
        self.repeat(partial(self._files.remove, name))

    def names(self, folder: str) -> list[str]:
        return self.repeat(partial(self._files.names, folder))

    def sizes(self, folder: str) -> dict[str, int]:
        return self.repeat(partial(self._files.sizes, folder))

    def folders(self, folder: str) -> list[str]:
        return self.repeat(partial(self._files.folders, folder))

    def remove_folder(self, folder: str) -> None:
        self.repeat(partial(self._files.remove_folder, folder))

    def drop_unfinished(self, folder: str, which: Callable[[str], bool] = bool) -> int:
        return self.repeat(partial(self._files.drop_unfinished, folder, which))

    def stream(self, name: str) -> AbstractContextManager[Sink]:
        return self._files.stream(name)
