"""Tell glibc's allocator to keep the memory of messages instead of asking the kernel for it each time."""

from __future__ import annotations

import ctypes

# Numbers of <malloc.h>.
_M_TRIM_THRESHOLD = -1
_M_TOP_PAD = -2
_M_MMAP_THRESHOLD = -3

MIB = 1 << 20
# The most glibc accepts on 64 bits; by default it stops at 128 KiB until a larger block has been freed.
MMAP_THRESHOLD_BYTES = 32 * MIB
# What may lie unused at the top of the heap: some messages in flight, in both directions, of the largest size.
TRIM_THRESHOLD_BYTES = 512 * MIB
TOP_PAD_BYTES = 64 * MIB


def tune_allocator() -> bool:
    """Make malloc reuse blocks of up to 32 MiB; call it first thing in a process's main.

    By default every message of more than 128 KiB is mapped, touched page by page (4096 faults for 16 MiB) and
    unmapped again. The price is that up to 512 MiB which were needed once stay with the process. The settings hold
    for the whole process, so libraries do not call this. Returns False where malloc is not glibc's (musl, macOS,
    Windows): nothing is changed then.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    mallopt.argtypes = (ctypes.c_int, ctypes.c_int)
    mallopt.restype = ctypes.c_int
    settings = (
        (_M_MMAP_THRESHOLD, MMAP_THRESHOLD_BYTES),
        (_M_TRIM_THRESHOLD, TRIM_THRESHOLD_BYTES),
        (_M_TOP_PAD, TOP_PAD_BYTES),
    )
    accepted = [mallopt(parameter, value) == 1 for parameter, value in settings]
    return all(accepted)
