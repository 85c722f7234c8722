"""Features of the frozen image encoder for the batches of a training: from a cache in memory where they fit.

In: a dataset, an encoder, a limit in bytes. Out: batches, and their features (B, 1 + P, D) before the encoder's last
layer norm. The cache's size is shown while it is filled.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from capfilt.models.vit import VisionTransformer
from capfilt.progress import Progress
from capfilt.settings import Stage1Settings, Stage2Settings
from capfilt.train.batches import Batch, Cursor, PairDataset, iterate_batches, normalise
from capfilt.train.pretrained import ImageEncoder
from capfilt.train.processes import Processes

BATCH_SIZE = 64
"""Images encoded at a time."""


class FrozenFeatures:
    """The batches of a training, and their features: call it with one of them."""

    def __init__(
        self,
        encoder: ImageEncoder,
        dataset: PairDataset,
        settings: Stage1Settings | Stage2Settings,
        processes: Processes,
        progress: Progress,
    ) -> None:
        self._encoder, self._dataset, self._settings = encoder, dataset, settings
        self._device, self._ranks, self._progress = processes.device, processes.ranks, progress
        self._cache: Tensor | None = None

    @property
    def fits(self) -> bool:
        """Whether features are computed once: no crop varies the images, and all of them fit in the limit."""
        varied = self._settings.random_crop < 1.0 or self._settings.random_flip
        size = num_feature_bytes(self._encoder.vision, len(self._dataset.keys))
        return not varied and size <= self._settings.feature_cache_bytes

    def open_batches(self, cursor: Cursor) -> Iterator[Batch]:
        """Fills the cache, if features fit, and opens the stream; its batches hold no pixels then."""
        if self.fits and self._cache is None:
            self._cache = _encode_all(self._encoder, self._dataset, self._device, self._progress)
        preparation = self._encoder.preparation
        return iterate_batches(
            self._dataset, self._settings, cursor, ranks=self._ranks,
            mean=preparation.mean, std=preparation.std, with_pixels=self._cache is None,
        )  # fmt: skip

    @torch.no_grad()
    def __call__(self, batch: Batch) -> Tensor:
        """Features (B, 1 + P, D) of the batch's images, on the device."""
        if self._cache is None:
            with torch.autocast(self._device.type, enabled=False):  # as those of the cache are
                return self._encoder.vision(batch.images.to(self._device))
        assert batch.rows is not None, "a dataset's batches carry rows"
        return self._cache[torch.from_numpy(batch.rows)].to(self._device)


def num_feature_bytes(vision: VisionTransformer, num_images: int) -> int:
    """Size of the cache for so many images, in float32."""
    return num_images * (vision.config.num_patches + 1) * vision.config.width * 4


@torch.no_grad()
def _encode_all(encoder: ImageEncoder, dataset: PairDataset, device: torch.device, progress: Progress) -> Tensor:
    num_images, sizes = len(dataset.keys), encoder.vision.config
    cache = torch.empty(num_images, sizes.num_patches + 1, sizes.width)
    megabytes = round(cache.nbytes / 1e6)
    progress.start("features", num_images, "image")
    for first in range(0, num_images, BATCH_SIZE):
        rows = np.arange(first, min(first + BATCH_SIZE, num_images))
        images = normalise(dataset.read_pixels(rows, None), encoder.preparation.mean, encoder.preparation.std)
        cache[first : first + len(rows)] = encoder.vision(images.to(device)).cpu()
        progress.advance(len(rows), cache_megabytes=megabytes)
    progress.finish()
    return cache
