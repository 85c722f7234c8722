"""The kept pairs of a run joined to their pictures: what every export with pictures is made of.

In: a run with a manifest. Out: images in the run's order, one in memory at a time, each with its kept captions, the
best first; cut into shards of a bounded size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from math import inf
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from capfilt.data.commit import read_table
from capfilt.data.manifest import read_pairs
from capfilt.data.rundir import RunDir
from capfilt.data.samples import Sample
from capfilt.data.schemas import SUCCESS
from capfilt.data.shards import read_samples
from capfilt.errors import CorruptionError
from capfilt.progress import Progress
from capfilt.settings.export import ExportSettings

T = TypeVar("T")
_FACTS = ["key", "original_width", "original_height", "image_ext"]


@dataclass(frozen=True, slots=True)
class KeptCaption:
    """A kept caption of an image."""

    text: str
    """As it came."""
    caption_index: int
    source: str
    """web, synthetic or human."""
    clip_score: float | None
    itm_score: float | None
    """None for captions that were not judged."""


@dataclass(frozen=True, slots=True)
class CuratedImage:
    """An image with kept captions."""

    shard: str
    """Of the run, that it is in."""
    sample: Sample
    extension: str
    """Of the stored picture: jpg, png or webp."""
    original_width: int | None
    original_height: int | None
    captions: tuple[KeptCaption, ...]
    """The best first; one at least."""

    @property
    def file_name(self) -> str:
        """SHARD/KEY.jpg: where its picture lies in a folder of pictures."""
        return f"{self.shard}/{self.sample.key}.{self.extension}"


@dataclass(frozen=True, slots=True)
class ExportSample:
    """What becomes one sample: an image, and captions of which the first is the sample's own."""

    key: str
    image: CuratedImage
    captions: tuple[KeptCaption, ...]

    def row(self) -> dict[str, Any]:
        """What is known of it: the columns of img2dataset, scores and source of its caption, and the same of all."""
        sample, best = self.image.sample, self.captions[0]
        return {
            "url": sample.url or None, "caption": best.text, "key": self.key, "status": SUCCESS, "error_message": None,
            "width": sample.width, "height": sample.height, "original_width": self.image.original_width,
            "original_height": self.image.original_height, "sha256": sample.sha256, "source": best.source,
            "clip_score": best.clip_score, "itm_score": best.itm_score,
            "captions": [caption.text for caption in self.captions],
            "sources": [caption.source for caption in self.captions],
            "clip_scores": [caption.clip_score for caption in self.captions],
            "itm_scores": [caption.itm_score for caption in self.captions],
        }  # fmt: skip


@dataclass(frozen=True, slots=True)
class WrittenFile:
    """A file of an export that is meant to be read: a shard, or the one JSON file."""

    name: str
    """In the export's folder."""
    num_samples: int
    num_bytes: int


def written_file(folder: Path, name: str, num_samples: int) -> WrittenFile:
    """Of a file that is there."""
    return WrittenFile(name, num_samples, (folder / name).stat().st_size)


def curated_images(run: RunDir, shards: Iterable[str], selection: str, progress: Progress) -> Iterator[CuratedImage]:
    """The images of a checked manifest that have a kept caption; `progress` counts shards of the run.

    Raises CorruptionError for damage, at the latest when the last one was taken.
    """
    for shard in shards:
        yield from _images_of(run, shard, selection)
        progress.advance(1)


def export_samples(image: CuratedImage, captions: str) -> Iterator[ExportSample]:
    """The samples of an image: one, or one for each caption, then with a key of its own: KEY=0, KEY=1, …"""
    if captions == "best":
        yield ExportSample(image.sample.key, image, image.captions)
        return
    for number, caption in enumerate(image.captions):
        yield ExportSample(f"{image.sample.key}={number}", image, (caption,))


def cut(samples: Iterable[T], num_bytes: Callable[[T], int], settings: ExportSettings) -> Iterator[Iterator[T]]:
    """Shards of at most so many samples and bytes, one sample at least. Each is read to its end before the next."""
    rest = iter(samples)
    first = next(rest, None)

    def one() -> Iterator[T]:
        nonlocal first
        num, size = 0, 0
        while first is not None:
            num, size = num + 1, size + num_bytes(first)
            if num > settings.samples_per_shard or (num > 1 and size > settings.shard_mb * 1_000_000):
                return
            yield first
            first = next(rest, None)

    while first is not None:
        yield one()


def shortest(value: float | None) -> float | None:
    """A float32 as the shortest number that is the same float32."""
    return None if value is None else float(str(np.float32(value)))


def _images_of(run: RunDir, shard: str, selection: str) -> Iterator[CuratedImage]:
    pairs = read_pairs(run, shard, selection, kept_only=True)
    captions: dict[str, list[KeptCaption]] = {}
    for batch in pairs.to_batches(1000):
        for row in batch.to_pylist():
            scores = shortest(row["clip_score"]), shortest(row["itm_score"])
            caption = KeptCaption(row["text"], row["caption_index"], row["source"], *scores)
            captions.setdefault(row["key"], []).append(caption)
    if not captions:
        return
    facts = {row["key"]: row for row in read_table(run.stage_file("shards", shard), columns=_FACTS).to_pylist()}
    for sample in read_samples(run, shard, frozenset(captions)):
        found, own = facts[sample.key], sorted(captions.pop(sample.key), key=_from_the_best)
        yield CuratedImage(
            shard, sample, found["image_ext"], found["original_width"], found["original_height"], tuple(own)
        )
    if captions:
        raise CorruptionError(
            f"Shard {shard} of {run.path} lacks {len(captions)} samples of its manifest, the first "
            f"{min(captions)!r}. Look further: `capfilt verify {run.path} --deep`."
        )


def _from_the_best(caption: KeptCaption) -> tuple[float, float, int]:
    """By ITM score, then CLIP score, then index; what has none stands last."""
    itm, clip = (-inf if score is None else score for score in (caption.itm_score, caption.clip_score))
    return -itm, -clip, caption.caption_index
