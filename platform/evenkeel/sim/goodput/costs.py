"""What each part of a repair, a checkpoint or a start takes, in seconds."""

from dataclasses import dataclass, fields
from math import isfinite


@dataclass(frozen=True, slots=True)
class Costs:
    """Seconds, but for the rates.

    Attributes:
        detect_s: from a death to the controller that hears of it.
        abort_s: from the word to stop to the last worker's promise.
        settle_s: for the decision to be carried out.
        plan_s: planning, writing it down, telling everybody.
        regroup_s: for the process groups of a new world.
        reshard_s: of moving state, however little; each worker's missing bytes at `reshard_bytes_per_s` come on top.
        first_step_s: by how much the first step of a world takes longer than those after it.
        start_s: from the wish for a worker to one that is ready, on a node that is there.
        restore_s: of reading a checkpoint, however little; each worker's bytes at `restore_bytes_per_s` come on top.
        save_stall_s: for how long a checkpoint holds up the training.
        save_write_s: from there until it is durable, beside the training.
        mirror_stall_s: for how long a mirror holds up the training.
        mirror_send_s: from there until it is whole, beside the training.
        reshard_bytes_per_s, restore_bytes_per_s: what one worker receives or reads; None: no time by bytes.

    Raises:
        ValueError: if one is negative or not finite, or a rate is 0.
    """

    detect_s: float = 0.0
    abort_s: float = 0.0
    settle_s: float = 0.0
    plan_s: float = 0.0
    regroup_s: float = 0.0
    reshard_s: float = 0.0
    first_step_s: float = 0.0
    start_s: float = 0.0
    restore_s: float = 0.0
    save_stall_s: float = 0.0
    save_write_s: float = 0.0
    mirror_stall_s: float = 0.0
    mirror_send_s: float = 0.0
    reshard_bytes_per_s: float | None = None
    restore_bytes_per_s: float | None = None

    def __post_init__(self) -> None:
        for name in (field.name for field in fields(self)):
            value = getattr(self, name)
            rate = name.endswith("_per_s")
            if value is None or (isfinite(value) and (value > 0 if rate else value >= 0)):
                continue
            raise ValueError(f"costs: {name} is {value}; it must be {'above 0' if rate else '0 or more'}, and finite")

    def reshard(self, most_bytes: float) -> float:
        """Seconds to move state from its holders, if the worker that misses most misses so much."""
        return self.reshard_s + (most_bytes / self.reshard_bytes_per_s if self.reshard_bytes_per_s else 0.0)

    def restore(self, most_bytes: float) -> float:
        """Seconds to read a checkpoint, if the worker that reads most reads so much."""
        return self.restore_s + (most_bytes / self.restore_bytes_per_s if self.restore_bytes_per_s else 0.0)
