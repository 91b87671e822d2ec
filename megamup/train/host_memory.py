"""Training on a processor takes and frees the same large tensors in every step. glibc gives each back to the kernel,
which zeroes its pages again when they are next touched: 22,000 page faults and 4% of a step of a 10M model."""

from __future__ import annotations

import contextlib
import ctypes
import platform

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
"""Of glibc's malloc.h: free memory at the heap's end that is given back (-1: none), and allocations that are mappings
of their own, which are given back one by one."""


def keep_freed_memory() -> bool:
    """Have this process keep what it frees, for its next step. Returns whether its C library can (glibc)."""
    if platform.libc_ver()[0] != "glibc":
        return False
    with contextlib.suppress(AttributeError, OSError):
        mallopt = ctypes.CDLL(None).mallopt
        return bool(mallopt(M_MMAP_MAX, 0) and mallopt(M_TRIM_THRESHOLD, -1))
    return False
