"""How the C library deals with the memory that models on a CPU work in.

glibc gives a buffer above 32 MiB back to the system as soon as it is freed, and the next layer gets it anew, page by
page (benchmarks/LOG.md has what that costs). Elsewhere than on glibc nothing is changed.
"""

from __future__ import annotations

import ctypes
import sys

_TRIM_THRESHOLD, _MMAP_MAX = -1, -4  # mallopt's names for them
_NEVER = -1


def keep_freed_memory() -> None:
    """Keep what this process frees from now on, to its end; what was freed before goes back to the system.

    Call it when the models are loaded: from then on memory stays at its peak.
    """
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if not (hasattr(libc, "mallopt") and hasattr(libc, "malloc_trim")):
        return
    assert libc is not None
    libc.malloc_trim(0)
    libc.mallopt(_TRIM_THRESHOLD, _NEVER)
    libc.mallopt(_MMAP_MAX, 0)
