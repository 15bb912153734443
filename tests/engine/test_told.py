"""What a worker tells of errors that hold a secret: in its events, and in its log."""

import queue
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tiny import Tiny, layout_of, tokens
from torch import Tensor

from evenkeel.control import messages as m
from evenkeel.core.ids import NodeId, Version, WorkerId
from evenkeel.core.layout import WorkerInfo
from evenkeel.core.world import World
from evenkeel.data.dataset import TensorDataset
from evenkeel.engine.faults import Faults
from evenkeel.engine.job import CheckpointError, Job
from evenkeel.engine.local import static_world
from evenkeel.engine.saver import Saver
from evenkeel.engine.state import ShardState
from evenkeel.engine.worker import COMMIT_FAILED, Worker
from evenkeel.plan.copies import copies_of

SECRET = "hush-9f3c57e1a2"
A = WorkerId("a")
PLATFORM = Path(__file__).parents[2] / "platform"


def clean(text: str) -> str:
    return text.replace(SECRET, "***")


class Closing(TensorDataset):
    """Fails in the second step, of four micro-batches each: a job is made with one more."""

    def __init__(self, error: type[BaseException]) -> None:
        super().__init__(*tokens(0))
        self._error, self._left = error, 1 + 4 + 2

    def get(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        self._left -= 1
        if self._left < 0:
            try:
                raise KeyError(f"token={SECRET}")
            except KeyError as error:
                raise self._error(f"403 for https://there/x?sig={SECRET}") from error
        return super().get(indices)


def world_of(info: WorkerInfo, **changes: Any) -> World:
    return replace(static_world([info], layout_of([A], [[0, 4]], 1, [4]), 9), **changes)


def told_by_a_worker(job: Job, count: int, **changes: Any) -> list[m.Event]:
    """The first events of a worker that trains such a world."""
    sent: queue.SimpleQueue[m.Event] = queue.SimpleQueue()
    worker = Worker(A, NodeId("here"), job, sent.put)
    try:
        worker.deliver(m.Form(A, 1, world_of(worker.info(), **changes)))
        return [sent.get() for _ in range(count)]
    finally:
        worker.close()


@pytest.mark.parametrize("error", [PermissionError, SystemExit])
def test_what_the_users_code_raises_in_a_step(
    error: type[BaseException], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    job = replace(Tiny(tmp_path)(A), train=Closing(error), clean=clean)
    *_, failed = told = told_by_a_worker(job, 4)
    assert [type(event) for event in told] == [m.Joined, m.Reported, m.MemoryUsed, m.Failed]
    assert isinstance(failed, m.Failed)
    assert (failed.fault.step, failed.fault.phase) == (2, "forward")
    assert failed.fault.error == f"{error.__name__}: 403 for https://there/x?sig=***"
    log = capsys.readouterr().err
    assert SECRET not in log
    assert "KeyError: 'token=***'" in log and f"{error.__name__}: 403 for https://there/x?sig=***\n" in log
    assert "in get\n" in log


def test_what_a_checkpoint_cannot_be_read_for(tmp_path: Path) -> None:
    def load(*_: object) -> None:
        raise CheckpointError(f"not with {SECRET}")

    job = replace(Tiny(tmp_path)(A), load=load, clean=clean)
    (told,) = told_by_a_worker(job, 1, saved=True, base=Version(3, 1), generation=2)
    assert told == m.CheckpointUnreadable(A, 2, Version(3, 1), "not with ***")


def test_what_keeps_a_part_from_being_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def save(version: Version, worker: WorkerId, pieces: object, report: Any, moved: object) -> str:
        report(f"once more with {SECRET}")
        raise OSError(f"{SECRET} is refused\nfor good")

    def spoilt(*_: object) -> None:
        raise ValueError(f"no {SECRET}")

    job = replace(Tiny(tmp_path)(A), save=save, clean=clean)
    sent: queue.SimpleQueue[m.Event] = queue.SimpleQueue()
    world = world_of(WorkerInfo(A, NodeId("n"), 1))
    state, saver = ShardState(job.model, job.shape, world.layout.shard(A)), Saver(A, job, Faults(A, (), bool), sent.put)
    saver.begin(state, world.layout, copies_of(world, job.shape))
    saver.copy(Version(1, 1), last=False)
    assert sent.get() == m.StorageTrouble(A, "once more with ***")
    assert sent.get() == m.PartFailed(A, Version(1, 1), "*** is refused")
    monkeypatch.setattr(state, "range", spoilt)
    saver.begin(state, world.layout, copies_of(world, job.shape))
    saver.close()
    log = capsys.readouterr().err
    assert "ValueError: no ***\n" in log and SECRET not in log


TORN = f"""
from evenkeel.engine.worker import _die
try:
    raise ValueError("with {SECRET}")
except ValueError:
    _die(lambda text: text.replace("{SECRET}", "***"))
"""


def test_the_last_words_of_a_worker_whose_state_is_torn() -> None:
    command = [sys.executable, "-c", TORN]
    done = subprocess.run(command, env={"PYTHONPATH": str(PLATFORM)}, capture_output=True, text=True)
    assert done.returncode == COMMIT_FAILED
    assert done.stderr.endswith("ValueError: with ***\n") and SECRET not in done.stderr
