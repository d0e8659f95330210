"""What glibc does with large blocks that are given back to it."""

import ctypes
import sys

_M_MMAP_THRESHOLD = -3  # malloc.h
_LARGE_BYTES = 1 << 20


def return_large_blocks() -> None:
    """Have this process give what it frees in blocks of 1 MiB and more back to the system.

    glibc raises that limit to the largest block that was freed, 32 MiB at most, and cuts what is
    below from heaps, one or more for each thread. Between the states of a cache, of all sizes,
    there stays as much room as they take. Of no effect without glibc.
    """
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(_M_MMAP_THRESHOLD, _LARGE_BYTES)
