"""Files for one who may have lost the run: nothing is changed where somebody else runs it by now."""

from collections.abc import Callable
from contextlib import AbstractContextManager

from evenkeel.store.files import Files, Sink


class FencedFiles:
    """The same files; `fence` is asked before each call that changes one, and raises where that must not be.

    Between its answer and the change is a request: less than a successor needs to take a lease and begin. To have it
    asked also when a call is repeated, what repeats must be around this and not within it.
    """

    def __init__(self, files: Files, fence: Callable[[], None]) -> None:
        self._files, self._fence = files, fence

    def where(self, name: str = "") -> str:
        return self._files.where(name)

    def read(self, name: str, offset: int = 0) -> bytes | None:
        return self._files.read(name, offset)

    def read_into(self, name: str, offset: int, buffer: memoryview) -> int | None:
        return self._files.read_into(name, offset, buffer)

    def replace(self, name: str, data: bytes) -> None:
        self._fence()
        self._files.replace(name, data)

    def create(self, name: str, data: bytes) -> bool:
        self._fence()
        return self._files.create(name, data)

    def replace_if(self, name: str, data: bytes, gives_way: Callable[[], bool]) -> bool:
        def asked() -> bool:
            self._fence()
            return gives_way()

        return self._files.replace_if(name, data, asked)

    def remove(self, name: str) -> None:
        self._fence()
        self._files.remove(name)

    def names(self, folder: str) -> list[str]:
        return self._files.names(folder)

    def sizes(self, folder: str) -> dict[str, int]:
        return self._files.sizes(folder)

    def folders(self, folder: str) -> list[str]:
        return self._files.folders(folder)

    def remove_folder(self, folder: str) -> None:
        self._fence()
        self._files.remove_folder(folder)

    def drop_unfinished(self, folder: str, which: Callable[[str], bool] = bool) -> int:
        self._fence()
        return self._files.drop_unfinished(folder, which)

    def stream(self, name: str) -> AbstractContextManager[Sink]:
        self._fence()
        return self._files.stream(name)
