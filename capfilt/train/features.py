"""Features of the frozen image encoder for the batches of a training: from a cache, or computed anew.

In: a dataset, an encoder, settings. Out: batches, and their features (B, 1 + P, D) before the trained layer norm, in
the encoder's precision, or in that of `feature_cache_dtype` where they come from a cache. With `feature_cache_dir` they
are kept on disk (`capfilt.train.feature_store`), else in memory where they fit into `feature_cache_bytes`. Crops and
flips vary the images: features are computed anew then. What a cache takes is shown while it is filled. Where several
rows of a dataset show one image (questions about it), a cache holds its features once.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from capfilt.data.commit import fingerprint
from capfilt.models.packed import packed_copy
from capfilt.models.vit import VisionTransformer
from capfilt.progress import Progress
from capfilt.settings import FrozenEncoderSettings
from capfilt.train.batches import Batch, Cursor, PairDataset, iterate_batches, normalise
from capfilt.train.feature_store import FORMAT_VERSION, FeatureFile, open_features
from capfilt.train.processes import Processes
from capfilt.weights.blip import digest_vision
from capfilt.weights.image_encoders import ImageEncoder

BATCH_SIZE = 64
"""Images encoded at a time."""


class FrozenFeatures:
    """The batches of a training, and their features: call it with one of them."""

    def __init__(
        self,
        encoder: ImageEncoder,
        dataset: PairDataset,
        settings: FrozenEncoderSettings,
        processes: Processes,
        progress: Progress,
        images_digest: Callable[[], str] | None = None,
        image_rows: np.ndarray | None = None,
    ) -> None:
        """`images_digest()` identifies the dataset's images and their order, and is called where features go to disk;
        None: all are read to make it.

        `image_rows` (N,) names for each row the first that shows the same image; None: each row has its own.
        """
        self._encoder, self._dataset, self._settings = encoder, dataset, settings
        self._device, self._ranks = processes.device, processes.ranks
        self._progress, self._images_digest = progress, images_digest
        self._shown = np.arange(len(dataset.keys))  # rows read
        self._place = self._shown  # row → place in the cache
        if image_rows is not None:
            self._shown, self._place = np.unique(image_rows, return_inverse=True)
        self._cache: Tensor | None = None
        self._packed: VisionTransformer | None = None

    @property
    def stored_dtype(self) -> torch.dtype:
        """What a cache holds."""
        name = self._settings.feature_cache_dtype
        return self._encoder.dtype if name == "auto" else getattr(torch, name)

    @property
    def fits(self) -> bool:
        """Whether features are computed once: no crop varies the images, and they go to disk or fit in the limit."""
        size = num_feature_bytes(self._encoder.vision, len(self._shown), self.stored_dtype)
        on_disk = self._settings.feature_cache_dir is not None
        return not self._is_varied and (on_disk or size <= self._settings.feature_cache_bytes)

    @property
    def _is_varied(self) -> bool:
        return self._settings.random_crop < 1.0 or self._settings.random_flip

    def open_batches(self, cursor: Cursor) -> Iterator[Batch]:
        """Fills the cache, if there is to be one, and opens the stream; its batches hold no pixels then."""
        if self.fits and self._cache is None:
            self._cache = self._open_file() if self._settings.feature_cache_dir else self._encode_all()
            self._packed = None
            self._dataset.release()
        preparation = self._encoder.preparation
        return iterate_batches(
            self._dataset, self._settings, cursor, ranks=self._ranks,
            mean=preparation.mean, std=preparation.std, with_pixels=self._cache is None,
        )  # fmt: skip

    @torch.no_grad()
    def __call__(self, batch: Batch) -> Tensor:
        """Features (B, 1 + P, D) of the batch's images, on the device."""
        if self._cache is None:
            features = self._encode(batch.images_on(self._device))
            return features if self._is_varied else features.to(self.stored_dtype)  # as from a cache
        assert batch.rows is not None, "a dataset's batches carry rows"
        return self._cache[torch.from_numpy(self._place[batch.rows])].to(self._device)

    def _encode(self, images_BCHW: Tensor) -> Tensor:
        if self._packed is None:
            self._packed = packed_copy(self._encoder.vision)
        with torch.autocast(self._device.type, enabled=False):  # with and without a cache alike
            return self._packed(images_BCHW)

    @torch.no_grad()
    def _encode_places(self, places: np.ndarray) -> Tensor:
        """Features of the images at places of the cache."""
        preparation = self._encoder.preparation
        pixels = self._dataset.read_pixels(self._shown[places], None)
        images = normalise(pixels, preparation.mean, preparation.std, self._device)
        return self._encode(images).to(self.stored_dtype)

    def _shape(self) -> tuple[int, int, int]:
        sizes = self._encoder.vision.config
        return len(self._shown), sizes.num_patches + 1, sizes.width

    def _encode_all(self) -> Tensor:
        """Each process encodes a stretch of the images, and gets those of the others."""
        num_images, num_ranks = len(self._shown), self._ranks.num_ranks
        cache = torch.empty(self._shape(), dtype=self.stored_dtype)
        megabytes = round(cache.nbytes / 1e6)
        stretch = -(-num_images // num_ranks)
        self._progress.start("features", num_images, "image")
        for first in range(0, stretch, BATCH_SIZE):
            size = min(BATCH_SIZE, stretch - first)
            own = self._ranks.offset(stretch) + first + np.arange(size)
            encoded = self._encode_places(np.minimum(own, num_images - 1))
            of_all = self._ranks.gather(encoded.view(torch.uint8)).cpu().view(cache.dtype)
            for rank, features in enumerate(of_all.split(size)):
                part = cache[rank * stretch + first :][:size]
                part.copy_(features[: len(part)])
                self._progress.advance(len(part), cache_megabytes=megabytes)
        self._progress.finish()
        return cache

    def _open_file(self) -> Tensor:
        """Those on disk; one process writes them, while the others wait."""
        assert self._settings.feature_cache_dir is not None
        directory = Path(self._settings.feature_cache_dir).expanduser()
        file = FeatureFile(directory, self._digest(), self._shape(), self.stored_dtype)
        return open_features(file, lambda places: self._encode_places(places).cpu(), BATCH_SIZE, self._progress)

    def _digest(self) -> str:
        encoder = self._encoder
        return fingerprint({
            "format_version": FORMAT_VERSION,
            "encoder": digest_vision(encoder.vision, encoder.preparation),
            "images": self._images_digest() if self._images_digest else pixels_digest(self._dataset, self._shown),
            "dtype": str(self.stored_dtype),
        })[:32]  # fmt: skip


def num_feature_bytes(vision: VisionTransformer, num_images: int, dtype: torch.dtype = torch.float32) -> int:
    """Size of the cache for so many images."""
    return num_images * (vision.config.num_patches + 1) * vision.config.width * dtype.itemsize


def pixels_digest(dataset: PairDataset, rows: np.ndarray | None = None) -> str:
    """sha256 over the pixels of some rows of a dataset, in order; None for all."""
    rows, digest = np.arange(len(dataset.keys)) if rows is None else rows, hashlib.sha256()
    for first in range(0, len(rows), BATCH_SIZE):
        digest.update(dataset.read_pixels(rows[first : first + BATCH_SIZE], None).tobytes())
    return digest.hexdigest()
