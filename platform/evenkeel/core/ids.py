"""Names of workers, nodes, arrangements and states."""

from dataclasses import dataclass
from typing import NewType

WorkerId = NewType("WorkerId", str)
"""One life of one worker process, such as "w0003". Never used again, so that a stale message names nobody."""

NodeId = NewType("NodeId", str)
"""A machine: the failure domain that its workers share."""

Generation = int
"""The number of an arrangement of workers (a world). Only grows; a message of an older one changes nothing."""


@dataclass(frozen=True, slots=True, order=True)
class Version:
    """A state of the training: the step that made it, and the generation that committed that step.

    Version (0, 0) is the initialised model, or the weights that were imported in its place. Two states of the same
    step but of different generations may differ in their last bits (another order of sums), so a holder is a true
    source only if both agree.
    """

    step: int
    generation: Generation


IMPORTED: Generation = 0
"""Of a checkpoint that was put into a run directory for the run to begin from: below that of every world."""

INITIAL = Version(step=0, generation=0)
