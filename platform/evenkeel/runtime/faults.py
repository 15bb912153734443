"""Faults that are planned for the controller itself."""

import os
from collections.abc import Sequence

from evenkeel.engine.faults import KINDS
from evenkeel.runtime.spec import ControllerFault
from evenkeel.store.run_directory import RunDirectory


class ControllerFaults:
    """What the controller is to do to itself; each fault happens once per run, over all of the controller's lives."""

    def __init__(self, run: RunDirectory, faults: Sequence[ControllerFault]) -> None:
        self._run = run
        self._faults = tuple(faults)

    def fire(self, phase: str, step: int) -> None:
        """Lets those happen that are planned for this phase in `step` or before.

        Raises:
            RuntimeError: for the kind "exception".
        """
        for fault in self._faults:
            if fault.phase == phase and fault.step <= step and self._run.claim_fault(fault.key):
                if fault.kind == "exception":
                    raise RuntimeError(f"planned fault {fault.key}")
                os.kill(os.getpid(), KINDS[fault.kind])
