"""How the C library and oneDNN deal with the memory that models on a CPU work in.

glibc gives a buffer above 32 MiB back to the system as soon as it is freed, and the next layer gets it anew, page by
page (benchmarks/LOG.md has what that costs). Elsewhere than on glibc nothing is changed.

oneDNN, which computes in bfloat16, keeps the last 1,024 kernels that it made, each with memory to work in, and torch
keeps them a second time. A kernel is made for one shape: where every batch has another number of words, a training
grows by megabytes a step.
"""

from __future__ import annotations

import ctypes
import os
import sys

_KERNELS_KEPT = 16
"""More than a layer has shapes. Of a BLIP with 30,522 words 60 steps took as long as with 1,024: 265 s beside 263."""

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


def keep_few_kernels() -> None:
    """Let oneDNN keep no more than the last kernels, where the environment does not say otherwise.

    For work whose shapes change all the time; call it before the first matrix product.
    """
    for name in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
        os.environ.setdefault(name, str(_KERNELS_KEPT))
