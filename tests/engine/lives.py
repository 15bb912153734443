"""One life of a run after another, without Ray: each finds in the store what the one before has left there."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from evenkeel.config import load_config
from evenkeel.control import messages as m
from evenkeel.control.controller import Controller
from evenkeel.control.entries import Shown
from evenkeel.core.codec import dump
from evenkeel.engine.fleet import Fleet
from evenkeel.engine.local import LocalRun, Outcome
from evenkeel.engine.model import Model
from evenkeel.runtime import saving
from evenkeel.runtime.origin import version_to_resume
from evenkeel.runtime.prepare import Prepared, prepare
from evenkeel.runtime.run import write_beginning

DECODER: dict[str, Any] = {
    "name": "decoder", "d_model": 16, "layers": 2, "heads": 2, "kv_heads": 2, "d_ff": 24, "seq_len": 8, "dropout": 0.1,
}  # fmt: skip


def values_in(folder: Path, name: str, steps: int, precision: str = "fp32", **model: Any) -> dict[str, Any]:
    """A configuration: two stages of one worker each, a checkpoint every second step."""
    text = folder / "text.txt"
    if not text.exists():
        text.write_bytes(bytes(range(32, 127)) * 10)
    train = {"steps": steps, "global_batch": 8, "micro_batch": 2, "learning_rate": 0.01, "warmup_steps": 2}
    return {
        "run": {"name": name, "storage_path": str(folder / "runs"), "seed": 3},
        "model": DECODER | model,
        "data": {"name": "text", "path": str(text)},
        "train": {**train, "precision": precision},
        "scaling": {"workers": [2, 2]},
        "parallel": {"data": 1, "pipeline": 2, "tensor": 1},
        "checkpoint": {"every_steps": 2},
    }


def prepared_in(
    folder: Path, name: str, steps: int, precision: str = "fp32", given: Model | None = None, **model: Any
) -> Prepared:
    return prepare(load_config([], values=values_in(folder, name, steps, precision, **model)), given)


class Life(LocalRun):
    """Begins from what is in the store, completes checkpoints there, and ends with the run.

    Args:
        before: of the life before, which the journal tells of.
        last_step: to end after it, as if no more had been asked for yet.
        resume: as the user asks.
        formed: is called when a world is about to be told to its members.
    """

    def __init__(
        self,
        prepared: Prepared,
        before: Outcome | None = None,
        last_step: int | None = None,
        resume: str = "auto",
        formed: Callable[[], None] = lambda: None,
    ) -> None:
        policy = prepared.spec.policy
        policy = policy if last_step is None else replace(policy, last_step=last_step)
        super().__init__(prepared.maker, policy)
        if before is not None:
            shown = Shown.of(line.vote for line in reversed(before.metrics))
            self._controller = Controller(policy, 2, before.journal, shown, again=True)
            self.fleet = Fleet(prepared.maker, prefix="again")
            written_down(prepared, before)
        self._prepared, self._formed = prepared, formed
        self._resume = version_to_resume(prepared.directory, resume)

    def _feed(self, event: m.Event) -> None:
        if isinstance(event, m.Started):
            saved, damaged = saving.find(self._prepared.directory)
            event = m.Started((), saved, damaged, self._resume)
        super()._feed(event)

    def _carry_out(self, command: m.Command) -> None:
        if isinstance(command, m.CommitCheckpoint):
            self.fleet.events.put(saving.complete(self._prepared.directory, self._prepared.spec, command))
            return
        if isinstance(command, m.LookAt):
            self.fleet.events.put(saving.look(self._prepared.directory, command))
            return
        if isinstance(command, m.Form):
            self._formed()
        super()._carry_out(command)


def written_down(prepared: Prepared, outcome: Outcome) -> None:
    """In the run directory, as the Ray shell leaves it."""
    write_beginning(prepared, {}, None)
    journal = prepared.directory.journal()
    journal.read_all()
    journal.append(1, [dump(entry, m.Entry) for entry in outcome.journal])


def finished(life: Life) -> Outcome:
    outcome = life.run()
    assert (outcome.status, outcome.error) == ("finished", "")
    return outcome
