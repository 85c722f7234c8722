"""Whether the process can have more memory: where it cannot, nothing that fails is to blame for it."""

from __future__ import annotations

import mmap

SPARE_BYTES = 64 << 20


def require_memory() -> None:
    """Raise MemoryError where the process cannot have SPARE_BYTES more.

    For those who turn failures into verdicts: without memory a decoder fails in any of its ways, as does a connection.
    """
    try:
        mmap.mmap(-1, SPARE_BYTES).close()
    except OSError:
        raise MemoryError("no memory is left") from None
