"""Settings of an export with pictures."""

from __future__ import annotations

from dataclasses import dataclass

from capfilt.settings.checks import require

FOLDER_FORMATS = ("webdataset", "datasets", "img2dataset", "llava", "coco")
"""Of exports with pictures."""
UNCUT_FORMATS = ("llava", "coco")
"""Those that have one JSON file instead of shards."""
CAPTIONS = ("best", "each")
DEFAULT_CAPTIONS = {"coco": "each"}
"""Format → what stands for an image, where it is not `best`: COCO has a place for several captions."""


@dataclass(frozen=True, kw_only=True)
class ExportSettings:
    """Which captions an image goes with, and how large the shards are."""

    captions: str = "best"
    """`best`: a sample an image, its kept caption with the highest ITM score; `each`: one for every kept caption."""
    samples_per_shard: int = 10_000
    """Most samples of a shard (img2dataset's default)."""
    shard_mb: int = 1000
    """Most megabytes of a shard's samples; one larger sample has a shard of its own."""

    def __post_init__(self) -> None:
        require(self.captions in CAPTIONS, "captions", self.captions, f"one of {', '.join(CAPTIONS)}")
        require(self.samples_per_shard >= 1, "samples_per_shard", self.samples_per_shard, "at least 1")
        require(self.shard_mb >= 1, "shard_mb", self.shard_mb, "at least 1")
