"""Where the memory of a step on a CPU comes from."""

import ctypes
import os
import sys

# Of mallopt(3), glibc's.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_TRIM_AT = 2**31 - 1
_MMAP_AT = (2**30, 2**25)  # bytes; some versions of glibc refuse the first


def keep_freed_memory():
    """Have this process keep the memory that a step frees for the next one, and not hand it back to the system.

    A step of a small network otherwise spends up to a tenth of its time on page faults. The process does not take more
    memory than before at its peak, but stays there. For all of the process and for good; only with glibc, and where the
    environment does not say otherwise (MALLOC_TRIM_THRESHOLD_ and the like).
    """
    if not sys.platform.startswith("linux") or any(name.startswith("MALLOC_") for name in os.environ):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        any(mallopt(_M_MMAP_THRESHOLD, size) for size in _MMAP_AT)
        mallopt(_M_TRIM_THRESHOLD, _TRIM_AT)
