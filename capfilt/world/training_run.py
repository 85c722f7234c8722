"""Run directories of the miniature world to train on: scenes with true captions, as a curated run has them.

In: seeds and a folder. Out: committed shards and manifests, like those that `capfilt run` leaves, whose pairs'
source is "human": true captions that are kept and, where asked for, false ones that are dropped as `known_false`.
Shards that exist are not written again.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image

from capfilt.data.commit import commit_stage, file_sha256, read_table, stage_state
from capfilt.data.rundir import RunDir
from capfilt.data.schemas import SCHEMAS, SUCCESS
from capfilt.data.shards import write_tar
from capfilt.progress import NullProgress, Progress
from capfilt.world.language import caption, change_one_fact, full_caption
from capfilt.world.scenes import Scene, draw_scene, render

SIDES_PX = (64, 72, 96, 128, 160)
"""Edges of the pictures, drawn apart for width and height: the web's pictures are of all sizes."""


@dataclass(frozen=True, kw_only=True)
class WorldRunSettings:
    """What a training run of the world holds."""

    num_scenes: int
    """Scenes, all of the train split."""
    first_seed: int = 0
    """Seed of the first scene."""
    min_count: int = 1
    """Fewest objects in a scene; more make kinds easier to learn."""
    num_groups: int = 0
    """Groups of objects in every scene: 2 for scenes with a relation only; 0 for any."""
    captions_per_scene: int = 8
    """True captions of each scene; every other one states all facts."""
    false_captions_per_scene: int = 0
    """Captions of each scene that are false in one fact, dropped as `known_false`."""
    scenes_per_shard: int = 2000
    """Scenes in one shard."""


def write_world_run(
    path: Path, settings: WorldRunSettings, progress: Progress | None = None, *, num_processes: int = 2
) -> RunDir:
    """Write (or finish) a run of scenes with true captions."""
    progress = progress or NullProgress()
    run = RunDir.create(path)
    starts = range(0, settings.num_scenes, settings.scenes_per_shard)
    progress.start("scenes", settings.num_scenes, "scene")
    with run.lock(), ProcessPoolExecutor(num_processes) as pool:
        for shard_size in pool.map(_write_shard, [(path, settings, start) for start in starts]):
            progress.advance(shard_size)
    progress.finish()
    return run


def _write_shard(task: tuple[Path, WorldRunSettings, int]) -> int:
    path, settings, start = task
    run = RunDir.open(path)
    shard = f"{start // settings.scenes_per_shard:05d}"
    size = min(settings.scenes_per_shard, settings.num_scenes - start)
    fields = {"world": 2, "start": start, "size": size} | {
        name: getattr(settings, name) for name in ("first_seed", "min_count", "num_groups")
    }
    origin = "miniature world"
    if stage_state(run, "shards", shard, fields, origin) != "done":
        with run.new_staging() as staging:
            tar = staging / f"{shard}.tar"
            rows = _write_pictures(tar, settings, start, size)
            table = pa.Table.from_pylist(rows, schema=SCHEMAS["shards"])
            commit_stage(run, "shards", shard, table, fields=fields, input_digest=origin, rows_in=size, tar=tar)
    names = ("captions_per_scene", "false_captions_per_scene")
    manifest_fields = {"world": 2} | {name: getattr(settings, name) for name in names}
    digest = file_sha256(path / "shards" / f"{shard}.parquet")
    if stage_state(run, "manifest", shard, manifest_fields, digest) != "done":
        facts = read_table(run.stage_file("shards", shard), columns=["key", "width", "height", "sha256"])
        rows = _manifest_rows(settings, shard, start, facts.to_pylist())
        table = pa.Table.from_pylist(rows, schema=SCHEMAS["manifest"])
        commit_stage(run, "manifest", shard, table, fields=manifest_fields, input_digest=digest, rows_in=size)
    return size


def _key(settings: WorldRunSettings, place: int) -> str:
    return f"{place // settings.scenes_per_shard:05d}{place % settings.scenes_per_shard:04d}"


def _scene(settings: WorldRunSettings, place: int) -> Scene:
    """The scene at a place of the run: the first one drawn from its seeds that is as asked for."""
    for attempt in range(1000):
        scene = draw_scene(settings.first_seed + place + attempt * 10_000_000, "train")
        has_groups = settings.num_groups in (0, len(scene.groups))
        if has_groups and sum(group.count for group in scene.groups) >= settings.min_count:
            return scene
    raise ValueError(f"no scene as {settings} asks for in 1,000 draws")


def _write_pictures(tar: Path, settings: WorldRunSettings, start: int, size: int) -> list[dict[str, Any]]:
    """Paint and pack the scenes; give the rows of the shard."""
    rows: list[dict[str, Any]] = []

    def members() -> Iterator[tuple[str, bytes]]:
        for place in range(start, start + size):
            scene, rng = _scene(settings, place), np.random.default_rng([11, settings.first_seed + place])
            image, width, height, extension = encode_picture(scene, rng)
            key, text = _key(settings, place), caption(scene, rng)
            rows.append(
                {
                    "key": key, "url": f"world:{scene.seed}", "caption": text, "status": SUCCESS, "width": width,
                    "height": height, "original_width": width, "original_height": height,
                    "sha256": hashlib.sha256(image).hexdigest(), "image_ext": extension,
                }
            )  # fmt: skip
            yield f"{key}.{extension}", image
            yield f"{key}.txt", text.encode()
            yield f"{key}.json", json.dumps({"key": key, "seed": scene.seed, "caption": text}).encode()

    index = {member.name: member for member in write_tar(tar, members())}
    for row in rows:
        member = index[f"{row['key']}.{row['image_ext']}"]
        row["image_offset"], row["image_length"] = member.offset, member.length
    return rows


def encode_picture(scene: Scene, rng: np.random.Generator) -> tuple[bytes, int, int, str]:
    """Paint a scene at a size drawn at random, as JPEG, PNG or WebP: bytes, width, height, extension."""
    width, height = (int(side) for side in rng.choice(SIDES_PX, size=2))
    extension = str(rng.choice(["jpg", "png", "webp"], p=[0.7, 0.2, 0.1]))
    file_format, options = {
        "jpg": ("JPEG", {"quality": int(rng.integers(80, 96))}),
        "png": ("PNG", {"compress_level": 1}),
        "webp": ("WEBP", {"quality": 85, "method": 0}),
    }[extension]
    buffer = io.BytesIO()
    Image.fromarray(render(scene, width, height)).save(buffer, file_format, **options)
    return buffer.getvalue(), width, height, extension


def _manifest_rows(
    settings: WorldRunSettings, shard: str, start: int, pictures: list[dict[str, Any]]
) -> list[dict[str, Any]]:
    rows = []
    for place, facts in enumerate(pictures, start):
        scene, rng = _scene(settings, place), np.random.default_rng([13, settings.first_seed + place])
        pair = facts | {"shard": shard, "url": f"world:{scene.seed}", "source": "human"}
        for index in range(settings.captions_per_scene):
            text = full_caption(scene, rng) if index % 2 == 0 else caption(scene, rng)
            rows.append(pair | {"caption_index": index, "text": text, "kept": True})
        for index in range(settings.false_captions_per_scene):
            text, _ = change_one_fact(scene, rng)
            number = settings.captions_per_scene + index
            dropped = {"caption_index": number, "text": text, "kept": False, "drop_reason": "known_false"}
            rows.append(pair | dropped)
    return rows
