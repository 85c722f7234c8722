"""Features of the frozen image encoder for the batches of a training: from a cache in memory where they fit.

In: a dataset, an encoder, a limit in bytes. Out: features (B, 1 + P, D) before the encoder's last layer norm.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from capfilt.models.vit import VisionTransformer
from capfilt.progress import Progress
from capfilt.settings import Stage1Settings, Stage2Settings
from capfilt.train.batches import Batch, PairDataset, normalise
from capfilt.train.pretrained import ImageEncoder

BATCH_SIZE = 64
"""Images encoded at a time."""


class FrozenFeatures:
    """Call it with a batch; `num_bytes` is the cache's size, 0 where features are computed at every step."""

    def __init__(
        self,
        encoder: ImageEncoder,
        dataset: PairDataset,
        settings: Stage1Settings | Stage2Settings,
        device: torch.device,
        progress: Progress,
    ) -> None:
        self._vision, self._device = encoder.vision, device
        self._cache: Tensor | None = None
        varied = settings.random_crop < 1.0 or settings.random_flip
        if not varied and num_feature_bytes(encoder.vision, len(dataset.keys)) <= settings.feature_cache_bytes:
            self._cache = _encode_all(encoder, dataset, device, progress)

    @property
    def num_bytes(self) -> int:
        return 0 if self._cache is None else self._cache.nbytes

    @property
    def cached(self) -> bool:
        return self._cache is not None

    @torch.no_grad()
    def __call__(self, batch: Batch) -> Tensor:
        """Features (B, 1 + P, D) of the batch's images, on the device."""
        if self._cache is None:
            return self._vision(batch.images.to(self._device))
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
