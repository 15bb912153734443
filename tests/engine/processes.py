"""Runs one function in several processes and gives back what each returned."""

import multiprocessing
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import torch

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["torch", "torch.distributed", "evenkeel.engine.pipeline"])


def run_processes(function: Callable[..., Any], count: int, *arguments: Any) -> list[Any]:
    """[function(rank, *arguments) for each rank], each in a process of its own; raises what the first one raised."""
    pipes, processes = [], []
    for rank in range(count):
        ours, theirs = _context.Pipe()
        process = _context.Process(target=_call, args=(theirs, function, rank, arguments), daemon=True)
        process.start()
        theirs.close()
        pipes.append(ours)
        processes.append(process)
    try:
        results = [pipe.recv() for pipe in pipes]
    finally:
        for process in processes:
            process.kill()
            process.join()
    for error, _ in results:
        if error:
            raise AssertionError(error)
    return [result for _, result in results]


def _call(pipe: "Connection[Any, Any]", function: Callable[..., Any], rank: int, arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    try:
        pipe.send(("", function(rank, *arguments)))
    except BaseException:
        pipe.send((traceback.format_exc(), None))
    pipe.recv()  # a process that ends early would break its neighbours' groups
