"""Text as bytes: sample i is a window of seq_len bytes, and its targets are the bytes one further on."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from hashlib import blake2b
from typing import Any

import numpy as np
import torch
from torch import Tensor

from evenkeel.config_values import ConfigError, convert
from evenkeel.data.corpus import Bytes, Corpus, read_corpus
from evenkeel.data.dataset import Data

BYTES = 256
PRINTED_WHOLE = 64 * 2**20
PLACES = 1024
"""A text's fingerprint, which each worker takes, is of all of it up to so many bytes (0.1 s), of a longer one of that
many at so many places."""


@dataclass(frozen=True, slots=True)
class TextConfig:
    """Keys of section `data`.

    Attributes:
        path: a file, a directory, or "stdlib": the sources of this Python's own standard library.
        eval_path: the same, for validation; null: the last `eval_share` of `path`, which is not trained on then.
        suffix: of the files that count in a directory, such as ".txt"; null: all.
        seq_len: bytes per sample; the model's, if it has one.
    """

    path: str = "stdlib"
    eval_path: str | None = None
    suffix: str | None = None
    seq_len: int = 128
    eval_share: float = 0.05


def load(config: Mapping[str, Any]) -> Data:
    """Raises ConfigError, naming the key: for a missing, empty or too short text, and for bad values."""
    c: TextConfig = convert(config, TextConfig, "data", "", False)
    if c.seq_len < 1:
        raise ConfigError(f"is {c.seq_len}; must be at least 1", "data.seq_len")
    if not 0 <= c.eval_share < 1:
        raise ConfigError(f"is {c.eval_share}; expected 0 <= eval_share < 1", "data.eval_share")
    corpus = read_corpus(c.path, c.suffix, "data.path")
    windows = _windows(corpus.text, c.seq_len, c.path, "data.path")
    if c.eval_path is not None:
        held_out = read_corpus(c.eval_path, c.suffix, "data.eval_path")
        evaluation = Windows(held_out, 0, _windows(held_out.text, c.seq_len, c.eval_path, "data.eval_path"), c.seq_len)
        return Data(Windows(corpus, 0, windows, c.seq_len), evaluation, BYTES)
    kept = windows - min(windows - 1, -int(-windows * c.eval_share // 1))
    evaluated = Windows(corpus, kept, windows, c.seq_len) if kept < windows else None
    return Data(Windows(corpus, 0, kept, c.seq_len), evaluated, BYTES)


def _windows(text: Bytes, seq_len: int, path: str, key: str) -> int:
    """How many samples there are: windows do not overlap, but the last target is the next one's first byte."""
    windows = (len(text) - 1) // seq_len
    if windows < 1:
        raise ConfigError(f"{path} has {len(text)} bytes; one sample takes seq_len + 1 = {seq_len + 1}", key)
    return windows


class Windows:
    """Windows `start` to `stop` of a text, as a dataset."""

    def __init__(self, corpus: Corpus, start: int, stop: int, seq_len: int) -> None:
        self._corpus = corpus
        self._start, self._stop, self._seq_len = start, stop, seq_len

    def __len__(self) -> int:
        return self._stop - self._start

    def get(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Inputs and targets, (micro_batch, seq_len) int64 each.

        Raises:
            IndexError: for an index outside of the dataset.
            ValueError: if the text was written to since it was opened.
        """
        self._corpus.check()
        rows = np.empty((len(indices), self._seq_len + 1), dtype=np.int64)
        for row, index in zip(rows, indices, strict=True):
            if not 0 <= index < len(self):
                raise IndexError(f"sample {index} of {len(self)}")
            first = (self._start + index) * self._seq_len
            row[:] = self._corpus.text[first : first + self._seq_len + 1]
        self._corpus.check()  # also of what was written while this was read
        tokens = torch.from_numpy(rows)
        return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()

    def fingerprint(self) -> str:
        return self._fingerprint

    @cached_property
    def _fingerprint(self) -> str:
        span = self._corpus.text[self._start * self._seq_len : self._stop * self._seq_len + 1]
        digest = blake2b(f"text {self._seq_len} {len(self)} ".encode(), digest_size=16)
        for part in _looked_at(span):
            digest.update(part.data)
        return digest.hexdigest()


def _looked_at(span: Bytes) -> Iterator[Bytes]:
    """All of a text, or where that would take long, its beginning, its end and places between."""
    if len(span) <= PRINTED_WHOLE:
        yield span
        return
    size = PRINTED_WHOLE // PLACES
    for place in range(PLACES):
        start = (len(span) - size) * place // (PLACES - 1)
        yield span[start : start + size]
