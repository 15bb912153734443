"""Pipeline schedules: the order of forward and backward passes in one stage, as a list of actions.

What an executor does around an action is the same for both schedules: before a forward pass it receives the
activations of that micro-batch from the stage before, after it it sends its own on; before a backward pass it
receives the gradient from the stage after, and sends its own back. Receives may block. **Sends must not**: in 1F1B
a stage sends activations forward while the next one sends a gradient back, and two sends that wait for each
other's receive would never end.
"""

from dataclasses import dataclass
from enum import Enum


class Kind(Enum):
    FORWARD = "forward"
    BACKWARD = "backward"


@dataclass(frozen=True, slots=True)
class Action:
    """One pass of one micro-batch; `micro` counts from 0 within the pipeline's share."""

    kind: Kind
    micro: int


def one_f_one_b(stage: int, stages: int, micros: int) -> tuple[Action, ...]:
    """1F1B (Narayanan et al., "PipeDream-Flush", 2021): at most `stages - stage` micro-batches are in flight.

    The pipeline takes (micros + stages - 1) forward and backward times of its slowest stage.

    Args:
        stage: index of the stage, from 0.
        micros: micro-batches of the pipeline's share; may be 0.

    Raises:
        ValueError: if the stage does not lie within the pipeline, or micros is negative.
    """
    _check(stage, stages, micros)
    ahead = min(stages - stage - 1, micros)
    actions = [Action(Kind.FORWARD, m) for m in range(ahead)]
    for m in range(ahead, micros):
        actions += [Action(Kind.FORWARD, m), Action(Kind.BACKWARD, m - ahead)]
    actions += [Action(Kind.BACKWARD, m) for m in range(micros - ahead, micros)]
    return tuple(actions)


def gpipe(stage: int, stages: int, micros: int) -> tuple[Action, ...]:
    """GPipe (Huang et al., 2019): all forward passes, then all backward passes; all micro-batches are in flight.

    Backward passes go in the order of the forward passes, so that gradients are summed in the same order as in 1F1B.

    Raises:
        ValueError: as one_f_one_b.
    """
    _check(stage, stages, micros)
    return tuple(Action(kind, m) for kind in (Kind.FORWARD, Kind.BACKWARD) for m in range(micros))


def _check(stage: int, stages: int, micros: int) -> None:
    if not 0 <= stage < stages:
        raise ValueError(f"stage {stage} does not lie within a pipeline of {stages} stages")
    if micros < 0:
        raise ValueError(f"a share of {micros} micro-batches")
