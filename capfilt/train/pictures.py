"""Pictures of a training: decoded once and held as uint8 where all of them fit into memory, else when asked for.

In: what finds a picture by its number. Out: uint8 squares, cut as the views say.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from PIL import Image

from capfilt.progress import NullProgress, Progress
from capfilt.train.batches import View, crop_arrays, to_square

MEMORY_LIMIT_BYTES = 2 << 30
"""Decoded pictures are held in memory up to this many bytes (2 GiB: 175,000 pictures of 64 px)."""

MOST_DECODERS = 16
"""Threads that decode while a GPU computes, at most; a CPU that computes itself has no more than two for them."""

_CHUNK = 256
"""Pictures that are decoded at a time when all of them are."""

Decode = Callable[[], Image.Image]


class Pictures:
    """Pictures by number, 0 to `num` - 1."""

    def __init__(
        self,
        num: int,
        find: Callable[[int], Decode],
        *,
        image_size_px: int,
        smallest_crop: float = 1.0,
        memory_limit_bytes: int = MEMORY_LIMIT_BYTES,
        progress: Progress | None = None,
    ) -> None:
        """`find(number)` is called by one thread, what it returns, which decodes, by another.

        `smallest_crop` is the smallest share of a picture's area that is asked for: pictures in memory are held so
        large that a square crop is not scaled up (one of 3 to 4 by 15% along a side).
        """
        self._num, self._find, self._size_px = num, find, image_size_px
        self._held_px = math.ceil(image_size_px / math.sqrt(smallest_crop))
        self.in_memory = self.num_bytes_decoded <= memory_limit_bytes
        """Whether all are held once `open` was called."""
        self._progress = progress or NullProgress()
        self._decoded: np.ndarray | None = None
        self._pool = ThreadPoolExecutor(num_decoders(), thread_name_prefix="decode")
        """Threads that decode and cut."""

    @property
    def num_bytes_decoded(self) -> int:
        return self._num * self._held_px**2 * 3

    def open(self) -> None:
        """Decodes every picture, as large as it is held, where they are to be held and are not yet."""
        if not self.in_memory or self._decoded is not None:
            return
        decoded = np.empty((self._num, self._held_px, self._held_px, 3), np.uint8)
        self._progress.start("images", self._num, "image")
        for first in range(0, self._num, _CHUNK):
            numbers = range(first, min(first + _CHUNK, self._num))
            decoded[first : numbers.stop] = self._decode(numbers, None, self._held_px)
            self._progress.advance(len(numbers))
        self._progress.finish()
        self._decoded = decoded

    def read(self, numbers: np.ndarray, views: Sequence[View] | None) -> np.ndarray:
        """uint8 (B, S, S, 3); crops of pictures that are not held are cut from the full resolution."""
        if self._decoded is None:
            return self._decode(numbers.tolist(), views, self._size_px)
        return crop_arrays(self._decoded[numbers], views, self._size_px, self._pool)

    def _decode(self, numbers: Sequence[int], views: Sequence[View] | None, size_px: int) -> np.ndarray:
        shown = views or [View()] * len(numbers)
        found = [self._find(number) for number in numbers]
        squares = self._pool.map(lambda decode, view: to_square(decode(), size_px, view), found, shown)
        return np.stack(list(squares))


def num_decoders() -> int:
    """Threads for this process: beside a GPU as many as its processors, two at least; a launcher may have bound it."""
    if not torch.accelerator.is_available():
        return 2
    everyone = os.cpu_count() or 1
    own = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else everyone
    if own == everyone:
        own //= int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return max(2, min(MOST_DECODERS, own))
