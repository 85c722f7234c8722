"""Runs for tests of the shard loop: committed shards with pictures, and small models to work on them."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import pyarrow as pa

from capfilt.data.commit import commit_stage, read_table
from capfilt.data.rundir import RunDir
from capfilt.data.schemas import SCHEMAS
from capfilt.data.tars import write_tar
from capfilt.settings import CaptionSettings, FilterSettings, RankSettings
from tests import factories

WEB_CAPTIONS = ("a red dog on the grass", "", "Buy now! 50% off", "two cats", "a tree near a house")
PICTURE_SIZE_PX = (48, 40)
"""Width and height of the pictures, unless others are asked for."""


@dataclass(frozen=True)
class Models:
    """Folders of a captioner, a filter and a CLIP, with settings that name them."""

    root: Path

    def caption(self, **changes: object) -> CaptionSettings:
        """Four captions by nucleus sampling."""
        return CaptionSettings(
            **{"captioner": str(self.root / "captioner"), "num_captions": 4, "dtype": "float32", **changes}
        )  # type: ignore[arg-type]

    def rank(self, **changes: object) -> RankSettings:
        """The top two."""
        return RankSettings(**{"clip_model": str(self.root / "clip"), "dtype": "float32", **changes})  # type: ignore[arg-type]

    def filter(self, **changes: object) -> FilterSettings:
        """At 0.5."""
        return FilterSettings(**{"filter_model": str(self.root / "filter"), "dtype": "float32", **changes})  # type: ignore[arg-type]

    def recipe(self, *, num_captions: int, threshold: float = 0.5) -> str:
        """Text of a recipe with the three."""
        return (
            'description = "small"\n'
            f'[caption]\ncaptioner = "{self.root}/captioner"\nnum_captions = {num_captions}\ndtype = "float32"\n'
            f'[rank]\nclip_model = "{self.root}/clip"\ndtype = "float32"\n'
            f'[filter]\nfilter_model = "{self.root}/filter"\nthreshold = {threshold}\ndtype = "float32"\n'
        )


def save_models(root: Path) -> Models:
    """The three folders under `root`."""
    factories.save_captioner(root / "captioner")
    factories.save_filter(root / "filter")
    factories.save_clip(root / "clip")
    return Models(root)


def make_run(
    path: Path,
    *,
    num_shards: int = 2,
    num_samples: int = 7,
    broken: Sequence[int] = (),
    num_pictures: int | None = None,
    picture_size_px: tuple[int, int] = PICTURE_SIZE_PX,
) -> RunDir:
    """A run with committed shards; the pictures numbered in `broken` cannot be decoded.

    Every sample has a picture of its own, or, for large runs, one of `num_pictures`; all are of one width and height.
    """
    run = RunDir.create(path)
    for number in range(num_shards):
        first = number * num_samples
        numbers = range(first, first + num_samples)
        pictures = {n: encode_picture(n % num_pictures if num_pictures else n, *picture_size_px) for n in numbers}
        images = {f"{n:09d}": picture[: 200 if n in broken else None] for n, picture in pictures.items()}
        commit_shard(run, f"{number:05d}", images, num_shards * num_samples, num_shards, picture_size_px)
    return run


def read_stage(run: RunDir, stage: str) -> dict[str, pa.Table]:
    """Shard → rows of a stage."""
    return {shard: read_table(run.read_file(stage, shard)) for shard in run.shard_names()}


def read_all(run: RunDir) -> dict[str, dict[str, pa.Table]]:
    """Stage → shard → rows, of every annotation stage that is there."""
    stages = ("captions", "clip", "itm", "manifest")
    return {stage: read_stage(run, stage) for stage in stages if run.committed(stage)}


@lru_cache(maxsize=1000)
def encode_picture(seed: int, width_px: int = PICTURE_SIZE_PX[0], height_px: int = PICTURE_SIZE_PX[1]) -> bytes:
    """A PNG."""
    buffer = io.BytesIO()
    factories.draw_picture(seed, width_px=width_px, height_px=height_px).save(buffer, "PNG")
    return buffer.getvalue()


def commit_shard(
    run: RunDir, shard: str, images: dict[str, bytes], source_rows: int, num_shards: int, size_px: tuple[int, int]
) -> None:
    width, height = size_px
    captions = {key: WEB_CAPTIONS[int(key) % len(WEB_CAPTIONS)] for key in images}
    members = []
    for key, image in images.items():
        metadata = json.dumps({"key": key}).encode()
        members += [(f"{key}.png", image), (f"{key}.txt", captions[key].encode()), (f"{key}.json", metadata)]
    with run.new_staging() as staging:
        index = write_tar(staging / "shard.tar", members)[::3]
        rows = [
            {
                "key": key, "url": f"http://example.com/{key}", "caption": captions[key], "status": "success",
                "width": width, "height": height, "original_width": width, "original_height": height,
                "image_ext": "png", "sha256": hashlib.sha256(image).hexdigest(), "image_offset": member.offset,
                "image_length": member.length,
            }
            for (key, image), member in zip(images.items(), index, strict=True)
        ]  # fmt: skip
        table = pa.Table.from_pylist(rows, schema=SCHEMAS["shards"])
        commit_stage(
            run, "shards", shard, table, fields={}, input_digest="table", rows_in=len(rows),
            tar=staging / "shard.tar", extra={"num_shards": num_shards, "source_rows": source_rows},
        )  # fmt: skip
