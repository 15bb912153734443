"""The journal: numbered entries, each created only if absent. It is also the fence between two controllers."""

import json
import uuid
from collections.abc import Sequence
from typing import Any

from evenkeel.store.errors import JournalFenced, StoreError
from evenkeel.store.files import Files
from evenkeel.store.untrusted import parse_json, short

FORMAT = 1
FOLDER = "journal"


class Journal:
    """Reads all that was written and appends to it. What an entry says is the caller's business.

    A file holds what one append was given: {"format", "epoch", "nonce", "entries": [...]}.
    """

    def __init__(self, files: Files) -> None:
        self._files = files
        self._nonce = uuid.uuid4().hex
        self._next = 1

    def read_all(self) -> list[dict[str, Any]]:
        """Every entry, oldest first. Appending goes on behind the last.

        Raises:
            StoreError: if a file is missing, damaged or of a newer format, by its name.
        """
        entries: list[dict[str, Any]] = []
        numbers = sorted(int(n[:-5]) for n in self._files.names(FOLDER) if n.endswith(".json") and n[:-5].isdecimal())
        for expected, number in enumerate(numbers, start=1):
            if number != expected:
                raise StoreError(f"{self._files.where(_file(expected))}: missing, though {_file(number)} is there")
            entries += self._read(_file(number))["entries"]
        self._next = len(numbers) + 1
        return entries

    def append(self, epoch: int, entries: Sequence[dict[str, Any]]) -> None:
        """Returns when the entries are durable, all together as one file.

        Raises:
            JournalFenced: somebody else has written the next file.
            StoreError: the store failed; whether the entries are there is unknown, so this controller must end too.
        """
        if not entries:
            return
        record = {"format": FORMAT, "epoch": epoch, "nonce": self._nonce, "entries": list(entries)}
        name = _file(self._next)
        if not self._files.create(name, json.dumps(record).encode()):
            raise self._fenced(name, self._read(name))
        self._next += 1

    def check(self) -> None:
        """Raises JournalFenced if somebody else has written the next file. From any thread, also beside an append."""
        name = _file(self._next)
        if self._files.read(name) is not None and (there := self._read(name)).get("nonce") != self._nonce:
            raise self._fenced(name, there)

    def _fenced(self, name: str, there: dict[str, Any]) -> JournalFenced:
        theirs = short(there.get("epoch"), 20)
        return JournalFenced(f"{self._files.where(name)}: written by another controller (epoch {theirs})")

    def _read(self, name: str) -> dict[str, Any]:
        data = self._files.read(name)
        where = self._files.where(name)
        try:
            record = check_format(parse_json(data or b""), FORMAT, where)
        except ValueError as error:
            raise StoreError(f"{where}: {error}") from None
        if not isinstance(record.get("entries"), list):
            raise StoreError(f"{where}: damaged: has no list of entries")
        return record


def check_format(record: Any, known: int, where: str) -> dict[str, Any]:
    """The record itself. Raises StoreError if it is not an object, or of a newer format than `known`."""
    version = record.get("format") if isinstance(record, dict) else None
    if not isinstance(record, dict) or not isinstance(version, int):
        raise StoreError(f"{where}: has no format version")
    if version > known:
        newer = short(version, 20)
        raise StoreError(f"{where}: has format {newer}; this evenkeel reads up to {known}, use a newer one")
    return record


def _file(number: int) -> str:
    return f"{FOLDER}/{number:06d}.json"
