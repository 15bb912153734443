"""The checksum of one copy of a part of the state, by which copies are compared; see plan/comparison.py.

The bits of parameters and moments are taken for a sequence of 32-bit words, written row by row into a table. The words
are added up by columns and by rows, modulo 2^32, which reads them once and needs no memory; these few sums are weighted
with fixed 64-bit numbers, odd ones for columns and even ones for rows, and added up.

- A flipped bit always shows. It changes one column's sum and one row's by 2^b modulo 2^32 with b below 32, so the
  result by that times the sum of the two weights, which is odd: not a multiple of 2^32.
- Two or more changed words, swapped ones too, are missed with a chance of about 2^-52 if they are anything; 2^-20 if
  they differ in nothing but their highest bits (two elements that lose their signs).
- It depends on the sequence alone: not on where the buffers lie, how they are cut, the device, or the order of sums.
"""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from evenkeel.engine.state import ShardState
from evenkeel.plan.comparison import Compared
from evenkeel.plan.state import KINDS

COLUMNS = 1 << 10
"""Words in a row of the table."""
BLOCK = {"cpu": 1 << 18, "cuda": 1 << 23}
"""Words that are read at a time: as many as stay in the cache, because they are read twice, by columns and by rows."""
RESULT = 1 << 52
"""Results are from 1 up to this: exact in a float64, and never 0, which is a result that is missing."""


def part_checksum(state: ShardState, part: Compared) -> int:
    """Of what a worker holds of a part that it owns: parameters and both moments, as far as they are kept."""
    origin = state.span(part.group.params).start
    spans = [(origin + start, origin + stop) for start, stop in part.ranges]
    return checksum(state.range(kind, *span) for kind in KINDS for span in spans)


def checksum(pieces: Iterable[Tensor]) -> int:
    """Of the bits of flat contiguous tensors, one behind the other; of types of 4 or 8 bytes, on one device."""
    columns: Tensor | None = None
    rows: list[Tensor] = []
    for block in _blocks(piece.view(torch.int32) for piece in pieces):
        whole = block.numel() // COLUMNS * COLUMNS
        table, rest = block[:whole].view(-1, COLUMNS), block[whole:]
        if columns is None:
            columns = block.new_zeros(COLUMNS)
        rows.append(table.sum(1, dtype=torch.int32))  # first: it reads faster, and leaves the block in the cache
        columns += table.sum(0, dtype=torch.int32)
        columns[: rest.numel()] += rest
        if rest.numel():
            rows.append(rest.sum(0, keepdim=True, dtype=torch.int32))
    if columns is None:
        return RESULT
    down = torch.cat(rows)
    total = (columns * (_weights(columns, 0) | 1)).sum() + (down * (_weights(down, COLUMNS) & ~1)).sum()
    return int(total) % RESULT + 1


def _blocks(pieces: Iterable[Tensor]) -> Iterator[Tensor]:
    """The words of all pieces in blocks of one size, the last one smaller."""
    block: list[Tensor] = []
    room = 0
    for piece in pieces:
        size = BLOCK[piece.device.type]
        while piece.numel():
            room = room or size
            block.append(piece[:room])
            piece = piece[room:]
            room -= block[-1].numel()
            if not room:
                yield torch.cat(block) if len(block) > 1 else block[0]
                block = []
    if block:
        yield torch.cat(block) if len(block) > 1 else block[0]


def _weights(sums: Tensor, first: int) -> Tensor:
    """Numbers that look random, as many as there are sums: splitmix64 of `first` and on (Steele, Lea, Flood, 2014)."""
    x = torch.arange(first + 1, first + 1 + len(sums), device=sums.device) * -0x61C8864680B583EB
    x = (x ^ (x >> 30)) * -0x40A7B892E31B1A47
    x = (x ^ (x >> 27)) * -0x6B2FB644ECCEEE15
    return x ^ (x >> 31)
