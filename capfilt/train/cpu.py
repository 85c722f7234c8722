"""What makes small models train faster on a CPU, set once per process.

Measured on two cores with the embedded captioner (batch 64): 422 ms a step before, 302 ms after.
"""

from __future__ import annotations

import ctypes
import sys

import torch

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_KEEP_BYTES = 1 << 30


def tune_cpu() -> None:
    """Treat denormal numbers as zero (AdamW's second moments decay into them, and each costs a hundred cycles),
    and keep freed memory instead of returning it to the system, which would be cleared again page by page."""
    torch.set_flush_denormal(True)
    if sys.platform == "linux":
        try:
            libc = ctypes.CDLL("libc.so.6")
            libc.mallopt(_M_MMAP_THRESHOLD, _KEEP_BYTES)
            libc.mallopt(_M_TRIM_THRESHOLD, _KEEP_BYTES)
        except (OSError, AttributeError):
            return  # another C library: only slower
