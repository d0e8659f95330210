"""A setting of glibc: large blocks that are freed go back to the system."""

import ctypes
import sys

_M_MMAP_THRESHOLD = -3  # malloc.h
_LARGE_BYTES = 1 << 20


def return_large_blocks() -> None:
    """Have this process give freed blocks of 1 MiB and more back to the system.

    glibc raises that limit to the largest block that was freed, 32 MiB at most. Smaller blocks come
    from heaps, where a cache's states of all sizes leave gaps as large as themselves. Without glibc
    this does nothing.
    """
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(_M_MMAP_THRESHOLD, _LARGE_BYTES)
