"""What a link between two workers takes: measured with the messages that stages send, one way at a time."""

import time
from collections.abc import Sequence
from math import inf
from statistics import median

import torch

from evenkeel.engine.collective import Group
from evenkeel.plan.hardware import Link

SIZES = (1 << 10, 1 << 16, 1 << 20, 1 << 23, 1 << 26)
"""Bytes of the messages."""
FASTEST = 1e14
"""Bytes a second; no link is near it, but noise may make a line that flat."""
WARM_UP, FEWEST, MOST = 1, 3, 30
"""Round trips of each size: some that are not counted, and some that are."""


def measure_link(group: Group, device: torch.device, budget_s: float) -> Link | None:
    """Round trips between the two members of a group, of which each calls this.

    Args:
        budget_s: of rank 0; no larger message is tried that would not be there and back within so many seconds.

    Returns:
        At rank 0 the link; None at rank 1, which only sends back.
    """
    if group.rank != 0:
        _answer(group, device)
        return None
    until = time.perf_counter() + budget_s
    samples: list[tuple[int, float]] = []
    for size in SIZES:
        if len(samples) >= 2:
            before, took_s = samples[-1]
            if time.perf_counter() + 2 * took_s * size / before * (WARM_UP + FEWEST) > until:
                break
        samples.append((size, median(_round_trips(group, device, size, budget_s / len(SIZES))) / 2))
    _tell(group, device, 0)
    return fit_link(samples)


def fit_link(samples: Sequence[tuple[int, float]]) -> Link:
    """Least squares of the relative errors of seconds = latency + bytes / bandwidth; see LogP's successors, such as
    Alexandrov et al., "LogGP", 1995.

    Args:
        samples: (bytes, seconds) of single messages, of at least two sizes.

    Raises:
        ValueError: for fewer, or times that are not above 0.
    """
    if len({b for b, _ in samples}) < 2 or not all(0 < s < inf for _, s in samples):
        raise ValueError("a link is fitted to messages of two sizes at least, and to times above 0")
    one = sum(1 / s**2 for _, s in samples)
    size = sum(b / s**2 for b, s in samples)
    square = sum(b * b / s**2 for b, s in samples)
    left, right = sum(1 / s for _, s in samples), sum(b / s for b, s in samples)
    per_byte = (one * right - size * left) / (one * square - size * size)
    latency = (left - size * per_byte) / one
    if latency < 0 or per_byte * FASTEST < 1:  # no line fits: the smallest and the largest one count
        (_, latency), (most, longest) = min(samples), max(samples)
        per_byte = max(longest - latency, longest / 2) / most
    return Link(1 / per_byte, latency)


def _round_trips(group: Group, device: torch.device, size: int, each_s: float) -> list[float]:
    there, back = _buffer(size, device), _buffer(size, device)
    until = time.perf_counter() + each_s
    taken: list[float] = []
    while len(taken) < WARM_UP + FEWEST or (len(taken) < WARM_UP + MOST and time.perf_counter() < until):
        _tell(group, device, size)
        _receive(group, back[:1])  # the other one is ready
        began = time.perf_counter()
        sent = group.isend(there, 1)
        _receive(group, back)
        taken.append(time.perf_counter() - began)
        sent.wait()
    return taken[WARM_UP:]


def _answer(group: Group, device: torch.device) -> None:
    size = torch.zeros(1, dtype=torch.int64, device=device)
    buffer = _buffer(1, device)
    while True:
        group.irecv(size, 0).wait()
        told = int(size.item())
        if told == 0:
            return
        if buffer.numel() != told:
            buffer = _buffer(told, device)
        ready = group.isend(buffer[:1], 0)
        group.irecv(buffer, 0).wait()
        ready.wait()
        group.isend(buffer, 0).wait()


def _tell(group: Group, device: torch.device, size: int) -> None:
    group.isend(torch.tensor([size], dtype=torch.int64, device=device), 1).wait()


def _receive(group: Group, buffer: torch.Tensor) -> None:
    group.irecv(buffer, 1).wait()
    if buffer.is_cuda:
        torch.cuda.synchronize(buffer.device)


def _buffer(size: int, device: torch.device) -> torch.Tensor:
    return torch.zeros(size, dtype=torch.uint8, device=device)
