"""A tensor-parallel group of threads: what the parallel layers need of a process group, with nothing to go wrong."""

import threading
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


class ThreadGroup:
    """One rank's side. Sums are made in the order of the ranks, once, so that all get the same bits."""

    def __init__(self, rank: int, shared: "_Shared") -> None:
        self.rank, self.size = rank, shared.size
        self.calls = 0
        self._shared = shared

    def all_reduce(self, tensor: Tensor) -> None:
        assert tensor.is_contiguous()
        self.calls += 1
        shared = self._shared
        shared.slots[self.rank] = tensor.detach().clone()
        shared.barrier.wait()
        with torch.no_grad():
            tensor.copy_(torch.stack(shared.slots).sum(0))
        shared.barrier.wait()


class _Shared:
    def __init__(self, size: int) -> None:
        self.size = size
        self.slots = [torch.empty(0)] * size
        self.barrier = threading.Barrier(size)


def on_ranks(size: int, work: Callable[[ThreadGroup], T]) -> list[T]:
    """The results of `work` on `size` threads, by rank. The first error is raised."""
    shared = _Shared(size)
    results: dict[int, T] = {}
    errors: list[BaseException] = []

    def run(rank: int) -> None:
        try:
            results[rank] = work(ThreadGroup(rank, shared))
        except BaseException as error:  # handed to the test below
            errors.append(error)
            shared.barrier.abort()

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise next((e for e in errors if not isinstance(e, threading.BrokenBarrierError)), errors[0])
    return [results[rank] for rank in range(size)]
