"""Real processes for tests: one function run in several of them, or children to talk to, stop and kill."""

import contextlib
import multiprocessing
import os
import signal
import traceback
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerProcess
from typing import Any

import torch

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["torch", "torch.distributed", "evenkeel.engine.worker"])


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


class Child:
    """A process that runs function(pipe, rank, *arguments); `pipe` is its end of the one here."""

    PATIENCE_S = 60.0
    """How long an answer may take before the test fails: it says that something hangs, never that it is slow."""

    def __init__(self, function: Callable[..., Any], rank: int, arguments: tuple[Any, ...]) -> None:
        self.rank = rank
        self._pipe, theirs = _context.Pipe()
        self._process: ForkServerProcess = _context.Process(
            target=_converse, args=(theirs, function, rank, arguments), daemon=True
        )
        self._process.start()
        theirs.close()

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    def send(self, message: Any) -> None:
        self._pipe.send(message)

    def receive(self) -> Any:
        """Its next message. Raises AssertionError with its traceback if it failed, died, or says nothing."""
        if not self._pipe.poll(self.PATIENCE_S):
            raise AssertionError(f"child {self.rank} said nothing for {self.PATIENCE_S} s")
        try:
            kind, message = self._pipe.recv()
        except (EOFError, ConnectionResetError):
            self._process.join()
            raise AssertionError(f"child {self.rank} ended with {self._process.exitcode}") from None
        assert kind == "message", message
        return message

    def ask(self, message: Any) -> Any:
        self.send(message)
        return self.receive()

    def kill(self) -> None:
        self._process.kill()
        self._process.join()

    def stop(self) -> None:
        """SIGSTOP; returns when every thread of it has stopped."""
        os.kill(self.pid, signal.SIGSTOP)
        while not self._stopped():
            os.sched_yield()

    def resume(self) -> None:
        os.kill(self.pid, signal.SIGCONT)

    def _stopped(self) -> bool:
        states = []
        for task in os.listdir(f"/proc/{self.pid}/task"):
            with open(f"/proc/{self.pid}/task/{task}/stat") as file:
                states.append(file.read().rpartition(")")[2].split()[0])
        return all(state == "T" for state in states)


class Line:
    """A child's end: what it is told, and what it answers."""

    def __init__(self, pipe: "Connection[Any, Any]") -> None:
        self._pipe = pipe

    def send(self, message: Any) -> None:
        self._pipe.send(("message", message))

    def receive(self) -> Any:
        return self._pipe.recv()


@contextlib.contextmanager
def children(function: Callable[..., Any], count: int, *arguments: Any) -> Iterator[list[Child]]:
    """Processes that run function(line, rank, *arguments), with a Line; all are killed at the end of the block."""
    started = [Child(function, rank, arguments) for rank in range(count)]
    try:
        yield started
    finally:
        for child in started:
            child.kill()


def _converse(pipe: Any, function: Callable[..., Any], rank: int, arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    try:
        function(Line(pipe), rank, *arguments)
    except EOFError:
        pass  # the test is over
    except BaseException:
        pipe.send(("error", traceback.format_exc()))
