"""Keeps freed host memory in the process: activations of one size come and go with every micro-batch."""

import ctypes

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
_KEEP_BYTES = 256 * 1024 * 1024


def keep_freed_memory() -> None:
    """Stops glibc from giving large blocks back to the system when they are freed.

    By default it maps and unmaps every block above 128 KiB, and trims its heaps; then each micro-batch pays for fresh
    pages again (measured with the default decoder: 551 page faults a micro-batch against 15, 2 % of its time). Blocks
    above 256 MiB are still given back. Does nothing where the C library is another one.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, _KEEP_BYTES)
        mallopt(_M_TRIM_THRESHOLD, _KEEP_BYTES)


class _Mallinfo2(ctypes.Structure):
    """Of glibc's malloc.h: `fordblks` are the bytes that are free in all of its heaps."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in (
            "arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost",
        )
    ]  # fmt: skip


def freed_bytes() -> int:
    """What was freed and is kept; 0 where the C library cannot tell (it is another one, or glibc before 2.33)."""
    mallinfo2 = getattr(ctypes.CDLL(None), "mallinfo2", None)
    if mallinfo2 is None:
        return 0
    mallinfo2.restype = _Mallinfo2
    return int(mallinfo2().fordblks)
