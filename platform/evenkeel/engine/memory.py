"""How much memory a device has, and the most that this process has used of it."""

import os
from contextlib import suppress
from pathlib import Path

import torch

from evenkeel.engine.allocator import freed_bytes

CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")
STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
FORGET_PEAK = "5"
"""What the kernel takes in CLEAR for: VmHWM is what is used now."""


def device_bytes(device: torch.device) -> int:
    """Of a GPU its own; on the CPU what all processes of this machine, or of this container, may use together."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    physical = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limit = CGROUP_LIMIT.read_text().strip() if CGROUP_LIMIT.exists() else "max"
    return min(physical, int(limit)) if limit.isdecimal() else physical


def peak_bytes(device: torch.device) -> int:
    """The most of the device's memory that tensors of this process took up; on the CPU, all of the process."""
    return int(torch.cuda.max_memory_allocated(device)) if device.type == "cuda" else _status("VmHWM")


def used_bytes(device: torch.device) -> int:
    """What is in use now, by the same measure; on the CPU without what is freed and kept for the next step."""
    if device.type == "cuda":
        return int(torch.cuda.memory_allocated(device))
    return _status("VmRSS") - freed_bytes()


def forget_peak(device: torch.device) -> None:
    """From here on the peak is that of what comes; on the CPU where the kernel permits it, or else OSError."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        CLEAR.write_text(FORGET_PEAK)


class Usage:
    """The most memory that is used from here on, beside what is in use all the time."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._before = peak_bytes(device)
        with suppress(OSError):  # where that is not permitted the peak is that of the process's life
            forget_peak(device)

    def measured(self) -> tuple[int, int]:
        """The most that this process ever used, and what of the peak from here on is free again now.

        Between two steps that is what a step takes: activations, and what is communicated and computed in passing. What
        was made meanwhile to stay, such as the buffer of a saver, is not in it. On the CPU it is at least what had been
        freed before, because that is kept and taken first.
        """
        peak = peak_bytes(self._device)
        return max(self._before, peak), max(0, peak - used_bytes(self._device))


def _status(field: str) -> int:
    lines = STATUS.read_text().splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith(field)))
