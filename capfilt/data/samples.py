"""The unit that flows through every stage: one image and its web caption. No files, no torch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Sample:
    """One image with the caption the web gave it, as `capfilt.data.shards.read_samples` yields it."""

    key: str
    """WebDataset's `__key__`: unique within a run."""
    image: bytes
    """The encoded image as stored in the tar (JPEG, PNG or WebP)."""
    web_caption: str
    """Text found beside the image; may be empty."""
    url: str
    """Where the image came from; empty for imported shards that do not say."""
    width: int
    """Width of the upright picture in pixels."""
    height: int
    """Height of the upright picture in pixels."""
    sha256: str
    """Hex digest of `image`."""
